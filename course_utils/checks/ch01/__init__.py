"""The checks of chapter 01, Tokenization: a module for each section, and what they share."""
