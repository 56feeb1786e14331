"""Data sets, and the degradations that make low-resolution pictures."""
