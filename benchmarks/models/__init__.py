"""Whole UNets and what they consist of: denoising steps, kernel counts, sizes, imports."""
