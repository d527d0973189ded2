"""Checks of chapter 10: circuits made of features."""
