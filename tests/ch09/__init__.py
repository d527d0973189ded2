"""Tests of chapter 09: dictionary learning."""
