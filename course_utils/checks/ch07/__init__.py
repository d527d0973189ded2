"""The checks of chapter 07, Linear probes: a module for each section, and what they share."""
