"""Whole images, from prompts to pixels: time, memory, and how exact each execution path is."""
