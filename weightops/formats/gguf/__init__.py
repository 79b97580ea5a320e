"""GGUF files: what is read of them, and the bytes of those that are written."""

from weightops.formats.gguf.file import gguf_layout
from weightops.formats.gguf.reading import GgufFile, read_gguf

__all__ = ["GgufFile", "gguf_layout", "read_gguf"]
