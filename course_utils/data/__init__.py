"""The generators that make the course's data."""
