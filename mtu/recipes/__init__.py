"""Recipes: complete trainings, from data to a scored model, that anyone can run again."""
