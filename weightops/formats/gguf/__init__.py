"""GGUF files: what is read of them, and the bytes of those that are written."""

from weightops.formats.gguf.file import GgufFile, gguf_layout, read_gguf

__all__ = ["GgufFile", "gguf_layout", "read_gguf"]
