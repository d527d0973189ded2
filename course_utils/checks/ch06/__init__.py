"""The checks of chapter 06, Superposition: a module for each section, and what they share."""
