"""Tokenizers as their files have them, apart from the models they belong to."""
