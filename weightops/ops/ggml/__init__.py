"""The block types of ggml: what their bytes stand for, and how numbers become such blocks."""
