"""Pure tensor functions, without names, files or devices."""
