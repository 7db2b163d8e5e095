"""Losses: each takes outputs and a packed row and returns sums and counts."""
