"""Checks of chapter 13: grokking modular addition."""
