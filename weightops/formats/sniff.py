"""What a file that is not what its name says really is, for an error that helps."""

from __future__ import annotations

import json
import re

from weightops.errors import CorruptInput
from weightops.io.escape import escape

LFS_MAGIC = b"version https://git-lfs"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (
        LFS_MAGIC,
        "a Git LFS pointer, not the weights",
        "run `git lfs pull`, or download the file itself",
    ),
    (b"<!doctype", "an HTML page", "the download saved an error or login page: fetch the file again"),
    (b"<html", "an HTML page", "the download saved an error or login page: fetch the file again"),
    (b"wdelta", "a compressed delta, or one of another version", "its name has to end in .wdelta"),
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


_PREAMBLE = re.compile(rb"(?:\xef\xbb\xbf|\s+|<\?xml[^>]*>|<!--.*?-->)*", re.DOTALL)
_DOCUMENT = "!doctype|html|head|body|error"
_ELEMENT = "title|meta|link|script|style|div|span|p|a|h[1-6]|center|table|form|pre|br"
_PAGE = re.compile(rf"<(?:{_DOCUMENT})\b".encode(), re.IGNORECASE)
_TAG = re.compile(rf"<(?:{_DOCUMENT}|{_ELEMENT})\b".encode(), re.IGNORECASE)
_JSON = re.compile(rb'[\s\xef\xbb\xbf]*[{\["]')
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")
"""A line of a file of tiktoken's."""
_MARKUP = (".html", ".htm", ".xhtml", ".xht", ".xml", ".svg")
_BINARY = (".safetensors", ".wdelta", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".npz")
_TROUBLE = {"error", "errors", "detail", "message", "msg"}
_CIRCUMSTANCES = {"code", "status", "statuscode", "success", "title", "type", "path", "timestamp", "request_id", "hint"}


def check_answer(head: bytes, name: str, content_type: str) -> None:
    """Refuse an answer of another kind than the name of the file promises; for files that no digest speaks for.

    `head` is the file's beginning, up to 4 KiB, `content_type` what the server calls it. What servers send instead
    of a file are pages for people, errors as JSON or XML, and Git LFS pointers.
    """
    lower, shown = name.lower(), escape(name)
    if head.startswith(LFS_MAGIC):
        raise explain(head, shown, "")
    if _is_page(head, content_type, lower):
        raise CorruptInput(f"{shown}: this is an HTML page, not the file", hint=_PAGE_HINT)
    if _is_trouble(head):
        said = escape(head.decode("utf-8", "replace").strip())
        raise CorruptInput(f"{shown}: the server answers with an error instead of the file ({said})")
    if lower.endswith(".json") and not _is_json(head):
        raise CorruptInput(f"{shown}: this is no JSON", hint=_ADDRESS_HINT)
    if _is_binary(lower, head) and _is_text(head):
        raise CorruptInput(f"{shown}: this is text, expected a binary file", hint=_ADDRESS_HINT)


_ADDRESS_HINT = "is it the address of the file itself?"
_PAGE_HINT = (
    "on a hub, /resolve/ in the place of /blob/ is the file itself, and org/name with --endpoint the repository;"
    " elsewhere, it may want a login"
)


def _is_page(head: bytes, content_type: str, name: str) -> bool:
    if name.endswith(_MARKUP):
        return False
    preamble = _PREAMBLE.match(head)
    at = preamble.end() if preamble else 0
    is_called_so = content_type in ("text/html", "application/xhtml+xml")
    return (_TAG if is_called_so else _PAGE).match(head, at) is not None


def _is_trouble(head: bytes) -> bool:
    """Whether this is a whole JSON object that says that something went wrong, and nothing else."""
    try:
        found = json.loads(head)
    except (ValueError, RecursionError):
        return False
    keys = {key.lower() for key in found} if isinstance(found, dict) else set()
    return bool(keys & _TROUBLE) and keys <= _TROUBLE | _CIRCUMSTANCES


def _is_binary(name: str, head: bytes) -> bool:
    """Whether a file of that name cannot be text; tokenizer.model can, as a list of tokens and ranks."""
    if name.endswith(".model"):
        return _RANK.match(head) is None
    return name.endswith(_BINARY)


def _is_json(head: bytes) -> bool:
    """Whether JSON begins so; a number or word alone is one only if nothing follows."""
    if _JSON.match(head):
        return True
    try:
        json.loads(head)
    except (ValueError, RecursionError):
        return False
    return True


def _is_text(head: bytes) -> bool:
    return not any(byte < 9 or 13 < byte < 32 or byte > 126 for byte in head)
