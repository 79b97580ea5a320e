"""JSON from strangers: no duplicate keys, no NaN, no unbounded nesting or numbers."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from itertools import islice
from typing import Any

import msgspec

from weightops.errors import CorruptInput
from weightops.io.escape import escape

MAX_BYTES = 100_000_000
"""The safetensors format's own limit on a header, and ample for any index or config."""
_WORDS = 4096


def loads(data: bytes, what: str, *, constants: bool = False) -> Any:
    """Parse UTF-8 JSON; `what` names the document in errors. `constants` lets Infinity and NaN through, as floats.

    Raises `CorruptInput` for anything that two parsers could read in two ways.
    """
    if len(data) > MAX_BYTES:
        raise CorruptInput(f"{what}: JSON of {len(data)} bytes, at most {MAX_BYTES} are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((key, _),) = Counter(k for k, _ in pairs).most_common(1)
            raise CorruptInput(f"{what}: the key {escape(key)!r} occurs twice")
        return result

    def constant(name: str) -> float:
        if constants:
            return float(name)
        raise CorruptInput(f"{what}: {name} is not JSON")

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise CorruptInput(f"{what}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise CorruptInput(f"{what}: JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise CorruptInput(f"{what}: not JSON at character {error.pos} ({error.msg})") from None
    except ValueError:
        raise CorruptInput(f"{what}: JSON holds a number of too many digits") from None
    if "\\u" in text:
        _reject_surrogates(value, what)
    return value


def load_object(data: bytes, what: str, *, constants: bool = False) -> dict[str, Any]:
    """Like `loads`, for documents whose top level must be an object."""
    value = loads(data, what, constants=constants)
    if not isinstance(value, dict):
        raise CorruptInput(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def _reject_surrogates(value: object, what: str) -> None:
    """Refuse half of a surrogate pair: it cannot be written back as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise CorruptInput(f"{what}: a string holds half of a surrogate pair") from None


def dumps(value: object, *, ascii_only: bool = False) -> bytes:
    """Readable canonical JSON: sorted keys, two spaces, LF at the end; the same bytes on every run."""
    words = json.JSONEncoder(indent=2, sort_keys=True, ensure_ascii=ascii_only).iterencode(value)
    out = io.BytesIO()
    while part := "".join(islice(words, _WORDS)):  # a manifest of a mixture has millions of words
        out.write(part.encode("utf-8"))
    out.write(b"\n")
    return out.getvalue()


def as_json(document: msgspec.Struct) -> dict[str, Any]:
    """A document of ours as JSON has it. Numbers that are not finite, which JSON does not have, are null."""
    found: dict[str, Any] = _finite(msgspec.to_builtins(document))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
