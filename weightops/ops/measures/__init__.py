"""What is counted as tensors stream by: losses, statistics, digests."""
