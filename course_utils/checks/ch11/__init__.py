"""Checks of chapter 11: activation oracles."""
