"""Whole UNets and their parts: denoising steps, kernel counts, sizes, imports."""
