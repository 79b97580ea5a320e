"""Repositories and files on servers: finding them, fetching them whole, reading ranges of them. Bytes, no tensors."""
