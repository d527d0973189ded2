"""Checks of chapter 14: Othello."""
