"""The checks of chapter 00, Tensors: a module for each section, and what they share."""
