"""Checksum lists, as md5sum, sha256sum, b2sum, b3sum and xxhsum write and check them.

Two kinds of line, which a list may mix: GNU's `HEX  NAME`, and BSD's `MD5 (NAME) = HEX`, which names the
algorithm. A GNU line leaves it to the length of the digest, which MD5 shares with XXH128 and SHA-256 with
BLAKE3; the name of the list then decides (`XXH128SUMS`, `weights.b3`), and must not contradict the length.
Sources: coreutils src/digest.c, xxHash cli/xxhsum.c; Meta's `checklist.chk` is md5sum's format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weightops.errors import CorruptInput, UsageError
from weightops.io.digests import HEX_DIGITS
from weightops.io.escape import escape
from weightops.io.paths import check_relative
from weightops.io.source import read_source

_BY_LENGTH = {16: "xxh64", 32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}
"""What a GNU line means in a list whose name says nothing."""

_BY_NAME = {algorithm: (algorithm,) for algorithm in HEX_DIGITS} | {
    "chk": ("md5",),
    "b2": ("blake2b",),
    "blake3": ("b3",),
    "xxh": ("xxh3_128", "xxh64"),
    "xxh3": ("xxh3_128", "xxh3_64"),
    "xxh128": ("xxh3_128",),
}
"""What the name of a list promises; the length chooses among several."""

_BY_TAG = {"MD5": "md5", "SHA1": "sha1", "SHA256": "sha256", "SHA512": "sha512", "BLAKE2b": "blake2b", "BLAKE3": "b3"}
_BY_TAG |= {"XXH64": "xxh64", "XXH3": "xxh3_64", "XXH128": "xxh3_128"}

_PROMISE = "|".join(sorted(_BY_NAME, key=len, reverse=True))
_LIST_NAME = re.compile(rf"(?:.*[^a-z0-9])?({_PROMISE})sums?(?:\.txt)?|(?:.*\.|manifest-)({_PROMISE})(?:\.txt)?")
_GNU_LINE = re.compile(r"(\\?)(XXH3_)?([0-9A-Fa-f]+) (?:[ *]|(?![ *]))(.+)", re.DOTALL)
_BSD_LINE = re.compile(r"(\\?)([A-Za-z0-9]+) \((.+)\) = (?:XXH3_)?([0-9A-Fa-f]+)", re.DOTALL)
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


@dataclass(frozen=True, slots=True)
class ChecksumEntry:
    """A file's path relative to its folder, and its digest in lower-case hexadecimal."""

    name: str
    algorithm: str
    hex: str


@dataclass(frozen=True, slots=True)
class ChecksumList:
    """A list as it was read; `shown` is its path, safe for a terminal."""

    shown: str
    entries: tuple[ChecksumEntry, ...]


def is_checksum_list(name: str) -> bool:
    """Whether a file of this name is by convention a checksum list: `MD5SUMS`, `x.sha256`, `checklist.chk`."""
    return bool(_promised(name))


def _promised(name: str) -> tuple[str, ...]:
    """The algorithms that the name of a list allows; none when it says nothing."""
    match = _LIST_NAME.fullmatch(name.casefold())
    return _BY_NAME[match[1] or match[2]] if match else ()


def read_checksums(path: Path, algorithm: str | None = None) -> ChecksumList:
    """Read a checksum list; raises as `parse_checksums` does, and `SourceMissing` when there is none."""
    _, data = read_source(path)
    return ChecksumList(escape(str(path)), parse_checksums(data, escape(str(path)), path.name, algorithm))


def parse_checksums(data: bytes, shown: str, list_name: str, algorithm: str | None = None) -> tuple[ChecksumEntry, ...]:
    """The entries of a list called `list_name`, in order; `algorithm` overrules what that name says.

    Accepts CRLF, upper-case digits, `./` before a name, whole lines of `#` comment, and blank lines at the end.
    Raises `CorruptInput` for any other line, names that leave the folder or name the list itself, an algorithm
    that does not fit, GNU lines of several lengths, a file that is listed twice with one algorithm, and an empty
    list; `UsageError` for an `algorithm` that does not exist.
    """
    if algorithm is not None and algorithm not in HEX_DIGITS:
        raise UsageError(f"unknown digest algorithm {escape(algorithm)!r}, expected one of {', '.join(HEX_DIGITS)}")
    allowed = (algorithm,) if algorithm is not None else _promised(list_name)
    entries: dict[tuple[str, str], ChecksumEntry] = {}
    gnu_digits: int | None = None
    for number, line in enumerate(_lines(data, shown), 1):
        if line.startswith("#"):
            continue
        where = f"{shown}: line {number}"
        if match := _BSD_LINE.fullmatch(line):
            escaped, tag, name, digest = match.groups()
            found = _tagged(tag, digest, allowed, where)
        elif match := _GNU_LINE.fullmatch(line):
            escaped, prefix, digest, name = match.groups()
            if gnu_digits not in (None, len(digest)):
                raise CorruptInput(f"{where}: a digest of {len(digest)} digits, the lines before have {gnu_digits}")
            gnu_digits = len(digest)
            found = _tagged("XXH3", digest, allowed, where) if prefix else _untagged(digest, allowed, where)
        else:
            raise CorruptInput(f"{where}: expected a digest and a file name, found {escape(line)!r}")
        name = check_relative((_unescape(name, where) if escaped else name).removeprefix("./"), where)
        if name == list_name:
            raise CorruptInput(f"{where}: the list names itself ({escape(name)!r})")
        if (name, found) in entries:
            raise CorruptInput(f"{where}: {escape(name)!r} is listed twice")
        entries[name, found] = ChecksumEntry(name, found, digest.lower())
    if not entries:
        raise CorruptInput(f"{shown}: lists no files")
    return tuple(entries.values())


def _lines(data: bytes, shown: str) -> list[str]:
    if data.startswith(b"\xef\xbb\xbf"):
        raise CorruptInput(f"{shown}: begins with a byte order mark", hint="save the list as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptInput(f"{shown}: not UTF-8 at byte {error.start}") from None
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")] if text.strip("\r\n") else []


def _tagged(tag: str, digest: str, allowed: tuple[str, ...], where: str) -> str:
    algorithm = _BY_TAG.get(tag)
    if algorithm is None:
        raise CorruptInput(f"{where}: unknown algorithm {tag}, expected one of {', '.join(_BY_TAG)}")
    if len(digest) != HEX_DIGITS[algorithm]:
        raise CorruptInput(f"{where}: a {tag} digest has {HEX_DIGITS[algorithm]} digits, found {len(digest)}")
    if allowed and algorithm not in allowed:
        raise CorruptInput(f"{where}: expected {' or '.join(allowed)}, found a {tag} digest")
    return algorithm


def _untagged(digest: str, allowed: tuple[str, ...], where: str) -> str:
    if not allowed:
        if len(digest) not in _BY_LENGTH:
            raise CorruptInput(f"{where}: no digest that we know has {len(digest)} digits")
        return _BY_LENGTH[len(digest)]
    for algorithm in allowed:
        if len(digest) == HEX_DIGITS[algorithm]:
            return algorithm
    expected = " or ".join(f"{HEX_DIGITS[a]} digits ({a})" for a in allowed)
    raise CorruptInput(
        f"{where}: expected {expected}, found {len(digest)} digits",
        hint="name the algorithm if the name of the list is wrong",
    )


def _unescape(name: str, where: str) -> str:
    def character(match: re.Match[str]) -> str:
        if match[0] not in _ESCAPES:
            raise CorruptInput(f"{where}: unknown escape {escape(match[0])!r} in a file name")
        return _ESCAPES[match[0]]

    return re.sub(r"\\.?", character, name, flags=re.DOTALL)


def render_gnu(entries: Iterable[ChecksumEntry]) -> bytes:
    """The list as md5sum, sha256sum, b2sum and `xxhsum` would print it, and check with `-c`.

    Raises `UsageError` when the entries have several algorithms, between which such a list cannot tell.
    """
    entries = tuple(entries)
    algorithms = sorted({entry.algorithm for entry in entries})
    if len(algorithms) > 1:
        raise UsageError(f"one checksum list cannot hold several algorithms: {', '.join(algorithms)}")
    return "".join(map(_gnu_line, entries)).encode("utf-8", "surrogateescape")


def _gnu_line(entry: ChecksumEntry) -> str:
    name = entry.name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if name != entry.name else ""
    prefix = "XXH3_" if entry.algorithm == "xxh3_64" else ""
    return f"{mark}{prefix}{entry.hex}  {name}\n"
