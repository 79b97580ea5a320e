"""Quantising a model block by block, with calibration data."""
