"""Checks of chapter 09: dictionary learning."""
