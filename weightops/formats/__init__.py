"""One module per container and list format: headers to lazy tensors, and tensors to file layouts."""
