"""The checks of chapter 04, Induction heads: a module for each section, and what they share."""
