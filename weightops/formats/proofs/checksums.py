"""Checksum lists, as md5sum, sha256sum, b2sum, b3sum, xxhsum and `openssl dgst` write them and people publish them.

Two kinds of line, which a list may mix: GNU's `HEX  NAME`, and BSD's `MD5 (NAME) = HEX`, which names the
algorithm. A GNU line leaves it to the length of the digest, which MD5 shares with XXH128 and SHA-256 with
BLAKE3; the name of the list then decides (`XXH128SUMS`, `weights.b3`), and must not contradict the length.
A list may stand in a clear-signed message: then only what is signed counts. The signature is not checked.
Sources: coreutils src/digest.c, xxHash cli/xxhsum.c, RFC 9580 section 7; Meta's `checklist.chk` is md5sum's format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightops.errors import CorruptInput, UsageError
from weightops.io.digests import HEX_DIGITS, NAMED, check_algorithm
from weightops.io.escape import escape
from weightops.io.paths import check_relative
from weightops.stores.local import read_source

BY_LENGTH = {16: "xxh64", 32: "md5", 40: "sha1", 56: "sha224", 64: "sha256", 96: "sha384", 128: "sha512"}
"""What a digest is that nothing says the algorithm of."""

_BLAKE2B = tuple(name for name in HEX_DIGITS if name.startswith("blake2b"))
_BY_NAME = {algorithm: (algorithm,) for algorithm in NAMED} | {
    "chk": ("md5",),
    "blake2b": _BLAKE2B,
    "b2": _BLAKE2B,
    "blake3": ("b3",),
    "xxh": ("xxh3_128", "xxh64"),
    "xxh3": ("xxh3_128", "xxh3_64"),
    "xxh128": ("xxh3_128",),
}
"""What the name of a list, or who asks for one, promises; the length chooses among several."""

_BY_TAG = {
    **{name: name for name in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", *_BLAKE2B)},
    **{"blake2b512": "blake2b", "blake2b-512": "blake2b", "blake3": "b3"},
    **{"xxh64": "xxh64", "xxh3": "xxh3_64", "xxh128": "xxh3_128"},
}
"""Tags of BSD lines, in lower case; OpenSSL writes SHA2-256 for SHA256."""
_TAGS = "MD5, SHA1, SHA224, SHA256, SHA384, SHA512, BLAKE2b, BLAKE3, XXH64, XXH3, XXH128"

_PROMISE = "|".join(sorted(_BY_NAME, key=len, reverse=True))
_LIST_NAME = re.compile(
    rf"(?:(?:.*[^a-z0-9])?({_PROMISE})sums?(?:\.txt)?|(?:.*\.|manifest-)({_PROMISE})(?:\.txt)?)(?:\.asc)?"
)
_GNU_LINE = re.compile(r"(\\?)(XXH3_)?([0-9A-Fa-f]+)[ \t](.*[^ \t].*|[ *][ \t]+)", re.DOTALL)
_BSD_LINE = re.compile(r"(\\?)([A-Za-z0-9][A-Za-z0-9/-]*) ?\((.+)\)[ \t]*=[ \t]*(?:XXH3_)?([0-9A-Fa-f]+)", re.DOTALL)
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
_HEADER = re.compile(r"(?:Hash|Charset|Comment|Version): .*")
_BEGIN, _SIGNATURE, _END = (
    f"-----{what}-----" for what in ("BEGIN PGP SIGNED MESSAGE", "BEGIN PGP SIGNATURE", "END PGP SIGNATURE")
)


@dataclass(frozen=True, slots=True)
class ChecksumEntry:
    """A file's path relative to its folder, and its digest in lower-case hexadecimal."""

    name: str
    algorithm: str
    hex: str


@dataclass(frozen=True, slots=True)
class ChecksumList:
    """A list as it was read; `shown` is its path, safe for a terminal, `notes` say what in it was passed over."""

    shown: str
    entries: tuple[ChecksumEntry, ...]
    notes: tuple[str, ...] = ()

    def by_file(self) -> dict[str, dict[str, str]]:
        """Digests by file name and algorithm."""
        found: dict[str, dict[str, str]] = {}
        for entry in self.entries:
            found.setdefault(entry.name, {})[entry.algorithm] = entry.hex
        return found


def is_checksum_list(name: str) -> bool:
    """Whether a file of this name is by convention a checksum list: `MD5SUMS`, `x.sha256`, `checklist.chk`."""
    return bool(_promised(name))


def _promised(name: str) -> tuple[str, ...]:
    """The algorithms that the name of a list allows; none when it says nothing."""
    match = _LIST_NAME.fullmatch(name.casefold())
    return _BY_NAME[match[1] or match[2]] if match else ()


def read_checksums(path: Path, algorithm: str | None = None, folder: Path | None = None) -> ChecksumList:
    """Read a checksum list, whose names are relative to `folder`, by default its own.

    Raises as `parse_checksums` does, and `SourceMissing` when there is none.
    """
    _, data = read_source(path)
    own = path.name
    if folder is not None and path.resolve().is_relative_to(folder.resolve()):
        own = path.resolve().relative_to(folder.resolve()).as_posix()
    return parse_checksums(data, escape(str(path)), path.name, algorithm, own)


def parse_checksums(
    data: bytes, shown: str, list_name: str, algorithm: str | None = None, own: str | None = None
) -> ChecksumList:
    """Read a list called `list_name`; `algorithm` overrules what that name says, `own` is its path in the folder.

    What coreutils read is read: CRLF, upper-case digits, tabs, indented lines, `#` comments, empty lines, a line
    that is there twice; and `./` before and inside names. A line for the list itself, which can never be right, is
    passed over and noted.
    Raises `CorruptInput` for any other line, names that leave the folder, an algorithm that does not fit, GNU lines
    of several lengths, a file with two digests by one algorithm, lines that a signature does not cover, and an
    empty list; `UsageError` for an `algorithm` that does not exist.
    """
    if algorithm is not None:
        check_algorithm(algorithm)
    allowed = _BY_NAME.get(algorithm, (algorithm,)) if algorithm is not None else _promised(list_name)
    own = own or list_name
    entries: dict[tuple[str, str], ChecksumEntry] = {}
    notes: list[str] = []
    gnu = _GnuLines()
    for number, line in _covered(_lines(data, shown), shown, notes):
        line = line.lstrip(" \t")
        if not line or line.startswith("#"):
            continue
        where = f"{shown}: line {number}"
        if match := _BSD_LINE.fullmatch(line):
            escaped, tag, name, digest = match.groups()
            found = _tagged(tag, digest, allowed, where)
        elif match := _GNU_LINE.fullmatch(line):
            escaped, prefix, digest, rest = match.groups()
            name = gnu.name(rest, digest, where)
            found = _tagged("XXH3", digest, allowed, where) if prefix else _untagged(digest, allowed, where)
        else:
            raise CorruptInput(f"{where}: expected a digest and a file name, found {escape(line)!r}")
        name = check_relative(_plain(_unescape(name, where) if escaped else name), where)
        if name == own:
            notes.append(f"{where}: the line for the list itself is passed over")
            continue
        entry = ChecksumEntry(name, found, digest.lower())
        if entries.setdefault((name, found), entry) != entry:
            raise CorruptInput(f"{where}: {escape(name)!r} is listed twice, with two {found} digests")
    if not entries:
        raise CorruptInput(f"{shown}: lists no files")
    return ChecksumList(shown, tuple(entries.values()), tuple(notes))


def _lines(data: bytes, shown: str) -> list[str]:
    if data.startswith(b"\xef\xbb\xbf"):
        raise CorruptInput(f"{shown}: begins with a byte order mark", hint="save the list as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptInput(f"{shown}: not UTF-8 at byte {error.start}") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def _covered(lines: list[str], shown: str, notes: list[str]) -> Iterator[tuple[int, str]]:
    """The lines that count, with their numbers: all of them, or those that a signature covers if there is one."""
    marks = {_BEGIN, _SIGNATURE, _END}
    numbered = iter(enumerate(lines, 1))
    if not marks.intersection(map(str.rstrip, lines)):
        yield from numbered
        return
    notes.append(f"{shown}: is signed; the signature was not checked (gpg --verify does)")
    for number, line in numbered:
        if line.rstrip() == _BEGIN:
            for number, header in numbered:
                if not header.strip():
                    break
                if not _HEADER.fullmatch(header.rstrip()):
                    raise CorruptInput(f"{shown}: line {number}: expected a header of a signed message")
            yield from _signed(numbered, shown)
        elif line.strip():
            raise CorruptInput(f"{shown}: line {number}: {escape(line)!r} is not covered by the signature")


def _signed(numbered: Iterator[tuple[int, str]], shown: str) -> Iterator[tuple[int, str]]:
    """The text of a signed message, up to the end of its signature."""
    for number, line in numbered:
        if line.rstrip() == _SIGNATURE:
            if any(line.rstrip() == _END for _, line in numbered):
                return
            break
        yield number, line.removeprefix("- ")
    raise CorruptInput(f"{shown}: ends in the middle of a signed message", hint="fetch the list again")


class _GnuLines:
    """What the first GNU line of a list settles for all: how long digests are, and how names are set off.

    After two blanks, or one and an asterisk, comes the name; but where the first line has only one blank, all have.
    """

    def __init__(self) -> None:
        self._digits: int | None = None
        self._one_blank = False

    def name(self, rest: str, digest: str, where: str) -> str:
        """The name in what follows the digest and one blank."""
        marked = len(rest) > 1 and rest[0] in " *"
        if self._digits is None:
            self._digits, self._one_blank = len(digest), not marked
        if len(digest) != self._digits:
            raise CorruptInput(f"{where}: a digest of {len(digest)} digits, the lines before have {self._digits}")
        return rest[1:] if marked and not self._one_blank else rest


def _plain(name: str) -> str:
    """The name without `./`, at its beginning or inside, and without doubled slashes; what is absolute stays so."""
    if name.startswith("/") or name.endswith("/"):
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _tagged(tag: str, digest: str, allowed: tuple[str, ...], where: str) -> str:
    algorithm = _BY_TAG.get(tag.casefold().replace("sha2-", "sha"))
    if algorithm is None:
        raise CorruptInput(f"{where}: unknown algorithm {tag}, expected one of {_TAGS}")
    if len(digest) != HEX_DIGITS[algorithm]:
        raise CorruptInput(f"{where}: a {tag} digest has {HEX_DIGITS[algorithm]} digits, found {len(digest)}")
    if allowed and algorithm not in allowed:
        raise CorruptInput(f"{where}: expected {' or '.join(_families(allowed))}, found a {tag} digest")
    return algorithm


def _untagged(digest: str, allowed: tuple[str, ...], where: str) -> str:
    if not allowed:
        if len(digest) not in BY_LENGTH:
            raise CorruptInput(f"{where}: no digest that we know has {len(digest)} digits")
        return BY_LENGTH[len(digest)]
    for algorithm in allowed:
        if len(digest) == HEX_DIGITS[algorithm]:
            return algorithm
    expected = " or ".join(f"{HEX_DIGITS[a]} digits ({a})" for a in _families(allowed))
    raise CorruptInput(
        f"{where}: expected {expected}, found {len(digest)} digits",
        hint="name the algorithm if the name of the list is wrong",
    )


def _families(allowed: tuple[str, ...]) -> list[str]:
    """The algorithms by their usual lengths only."""
    return [name for name in allowed if name in NAMED] or list(allowed)


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
