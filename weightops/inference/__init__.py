"""Running a model block by block: what it computes, and what it says."""
