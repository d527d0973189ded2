"""The checks of chapter 03, Training: a module for each section, and what they share."""
