"""Whole images, from prompts to pixels: their time, their memory, and their exactness on each execution path."""
