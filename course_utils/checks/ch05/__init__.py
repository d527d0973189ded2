"""The checks of chapter 05, Patching: a module for each section, and what they share."""
