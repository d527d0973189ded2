"""The checks of chapter 02, A transformer from scratch: a module for each section, and what they share."""
