"""Low-rank factors: products, DoRA, and the factors of a difference."""
