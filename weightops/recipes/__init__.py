"""Recipes: sources, operations on them, and outputs; what every command that writes a checkpoint is, in one line."""
