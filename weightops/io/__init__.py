"""Bytes, and no tensors: reading ranges, safe paths, strict JSON, digests, atomic commit."""
