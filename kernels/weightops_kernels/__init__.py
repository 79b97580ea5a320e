"""Matrix multiplication and packing kernels for quantised weights."""
