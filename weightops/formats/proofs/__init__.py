"""What files and tensors are held against: manifests, checksum lists, and those that are published."""
