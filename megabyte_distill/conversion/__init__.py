"""Hugging Face in and out: one table a model family, read in both directions."""
