"""What a file that is not what its name says really is, for an error that helps."""

from __future__ import annotations

from weightops.errors import CorruptInput

LFS_MAGIC = b"version https://git-lfs"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (
        LFS_MAGIC,
        "a Git LFS pointer, not the weights",
        "run `git lfs pull`, or download the file itself",
    ),
    (b"<!doctype", "an HTML page", "the download saved an error or login page: fetch the file again"),
    (b"<html", "an HTML page", "the download saved an error or login page: fetch the file again"),
    (b"gguf", "a GGUF file", "convert from the original checkpoint instead"),
    (b"pk\x03\x04", "a zip archive, as torch.save writes", "rename it to .bin or .pt"),
    (b"\x1f\x8b", "gzip data", "unpack it first"),
    (b"\x80", "a pickle, as old torch.save writes", "rename it to .bin or .pt"),
    (b"\x93numpy", "a NumPy file", "only torch and safetensors files hold checkpoints"),
    (b"{", "JSON text", "weights are in other files of the folder"),
)


def explain(head: bytes, name: str, otherwise: str) -> CorruptInput:
    """The error for file `name` that begins with `head`; `otherwise` is used when the head says nothing."""
    text = head[:64].lower().lstrip()
    for magic, what, hint in _MAGIC:
        if text.startswith(magic):
            return CorruptInput(f"{name}: this is {what}", hint=hint)
    return CorruptInput(f"{name}: {otherwise}")


def check_head(head: bytes, name: str) -> None:
    """Refuse what stands in for weights on servers: Git LFS pointers, and pages for people."""
    text = head[:64].lower().lstrip()
    if text.startswith((LFS_MAGIC, b"<!doctype", b"<html")):
        raise explain(head, name, "")
