"""Recipes: complete trainings that anyone can run again."""
