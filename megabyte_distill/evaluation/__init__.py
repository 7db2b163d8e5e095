"""How good a student is beside its teacher, and pictures of it."""
