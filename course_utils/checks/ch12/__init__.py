"""Checks of chapter 12: balanced brackets."""
