"""Number formats: float8, packed integers, ggml blocks, and what each can hold."""
