"""Reports as pages of their own, for people who would rather look than read."""
