"""Recipes, and what turns them into something that the loop trains."""
