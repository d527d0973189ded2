"""Checks of chapter 08: function vectors and steering."""
