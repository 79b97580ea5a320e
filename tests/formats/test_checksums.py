from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.formats.checksums import (
    ChecksumEntry,
    ChecksumList,
    _unescape,
    is_checksum_list,
    parse_checksums,
    read_checksums,
    render_gnu,
)
from weightops.io.digests import HEX_DIGITS, hash_file
from weightops.io.paths import check_relative

MD5 = "b1946ac92492d2347c6235b4d2611184"
XXH = "6bba86c7e069f56d5a10b435f1c8e49c"
SHA256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
XXH3 = "99fc819aaba2462a"


def parse(text: str, list_name: str = "list", algorithm: str | None = None) -> list[tuple[str, str, str]]:
    entries = parse_checksums(text.encode(), list_name, list_name, algorithm)
    return [(e.name, e.algorithm, e.hex) for e in entries]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{MD5}  a", ("a", "md5", MD5)),
        (f"{MD5} *a", ("a", "md5", MD5)),
        (f"{MD5} a", ("a", "md5", MD5)),
        (f"{MD5}  *a", ("*a", "md5", MD5)),
        (f"{MD5}  a  b", ("a  b", "md5", MD5)),
        (f"{MD5.upper()}  a", ("a", "md5", MD5)),
        (f"{MD5}  a\r", ("a", "md5", MD5)),
        (f"{MD5}  ./sub/a", ("sub/a", "md5", MD5)),
        (f"\\{MD5}  a", ("a", "md5", MD5)),
        (f"{SHA256}  模型.bin", ("模型.bin", "sha256", SHA256)),
        (f"MD5 (a) = {MD5}", ("a", "md5", MD5)),
        (f"MD5 (a (1) = x) = {MD5}", ("a (1) = x", "md5", MD5)),
        (f"SHA256 (a) = {SHA256}", ("a", "sha256", SHA256)),
        (f"BLAKE2b (a) = {SHA256}{SHA256}", ("a", "blake2b", SHA256 * 2)),
        (f"SHA512 (a) = {SHA256}{SHA256}", ("a", "sha512", SHA256 * 2)),
        (f"BLAKE3 (a) = {SHA256}", ("a", "b3", SHA256)),
        (f"XXH128 (a) = {XXH}", ("a", "xxh3_128", XXH)),
        (f"XXH3 (a) = {XXH3}", ("a", "xxh3_64", XXH3)),
        (f"XXH3 (a) = XXH3_{XXH3}", ("a", "xxh3_64", XXH3)),
        (f"XXH3_{XXH3}  a", ("a", "xxh3_64", XXH3)),
        (f"XXH64 (a) = {XXH3}", ("a", "xxh64", XXH3)),
        (f"{XXH3}  a", ("a", "xxh64", XXH3)),
    ],
)
def test_lines(line: str, expected: tuple[str, str, str]) -> None:
    assert parse(line) == parse(f"{line}\n") == parse(f"# from where\n{line}\n\n\r\n") == [expected]


@pytest.mark.parametrize(
    ("list_name", "digest", "algorithm"),
    [
        ("MD5SUMS", MD5, "md5"),
        ("x.md5", MD5, "md5"),
        ("zhixi.MD5SUM.txt", MD5, "md5"),
        ("md5sums.txt", MD5, "md5"),
        ("checklist.chk", MD5, "md5"),
        ("tokenizer_checklist.chk", MD5, "md5"),
        ("anything.txt", MD5, "md5"),
        ("XXH128SUMS", XXH, "xxh3_128"),
        ("weights-xxh128sums.txt", XXH, "xxh3_128"),
        ("x.xxh128", XXH, "xxh3_128"),
        ("x.xxh", XXH, "xxh3_128"),
        ("x.xxh", XXH3, "xxh64"),
        ("x.xxh3", XXH, "xxh3_128"),
        ("x.xxh3", XXH3, "xxh3_64"),
        ("x.xxh3_128", XXH, "xxh3_128"),
        ("SHA256SUMS", SHA256, "sha256"),
        ("manifest-sha256.txt", SHA256, "sha256"),
        ("B3SUMS", SHA256, "b3"),
        ("BLAKE3SUMS", SHA256, "b3"),
        ("x.b3", SHA256, "b3"),
        ("efficientnet-b3", SHA256, "sha256"),
        ("B2SUMS", SHA256 * 2, "blake2b"),
        ("SHA512SUMS", SHA256 * 2, "sha512"),
    ],
)
def test_algorithm_from_length_and_name(list_name: str, digest: str, algorithm: str) -> None:
    assert parse(f"{digest}  a\n", list_name) == [("a", algorithm, digest)]


def test_forced_algorithm_overrules_the_name() -> None:
    assert parse(f"{XXH}  a\n", "x.md5", "xxh3_128") == [("a", "xxh3_128", XXH)]
    with pytest.raises(CorruptInput, match=r"expected 64 digits \(sha256\), found 32 digits"):
        parse(f"{MD5}  a\n", "x.md5", "sha256")
    with pytest.raises(UsageError, match="unknown digest algorithm 'crc32'"):
        parse(f"{MD5}  a\n", "x.md5", "crc32")


def test_bsd_lists_may_mix_algorithms() -> None:
    text = f"MD5 (a) = {MD5}\nSHA256 (a) = {SHA256}\n"
    assert [(n, a) for n, a, _ in parse(text)] == [("a", "md5"), ("a", "sha256")]


@pytest.mark.parametrize(
    ("text", "list_name", "message"),
    [
        ("", "l", "lists no files"),
        ("\n\r\n", "l", "lists no files"),
        ("# nothing\n", "l", "lists no files"),
        (f"\ufeff{MD5}  a\n", "l", "byte order mark"),
        (f"{MD5}  a\ngarbage\n", "l", "line 2: expected a digest and a file name, found 'garbage'"),
        (f"{MD5}  a\n\n{XXH}  b\n", "l", "line 2: expected a digest"),
        (f" {MD5}  a\n", "l", "line 1: expected a digest"),
        (f"{MD5}\ta\n", "l", "line 1: expected a digest"),
        (f"{MD5}  \n", "l", "line 1"),
        ("<!doctype html>\n", "l", "line 1: expected a digest"),
        ("\x1b[2J\n", "l", r"found '\\\\x1b\[2J'"),
        (f"{MD5}  a\n{XXH}  a\n", "l", "line 2: 'a' is listed twice"),
        (f"{MD5}  a\n{MD5}  a\n", "l", "line 2: 'a' is listed twice"),
        (f"{MD5}  a\n{MD5}  ./a\n", "l", "line 2: 'a' is listed twice"),
        (f"MD5 (a) = {MD5}\n{MD5}  a\n", "l", "listed twice"),
        (f"{MD5}  ../a\n", "l", "not a plain path"),
        (f"{MD5}  b/../../a\n", "l", "not a plain path"),
        (f"{MD5}  /etc/passwd\n", "l", "not a plain path"),
        (f"{MD5}  C:\\a\n", "l", "not a plain path"),
        (f"{MD5}  C:a\n", "l", "not a plain path"),
        (f"{MD5}  a\0b\n", "l", "not a plain path"),
        (f"{MD5}  a\x1bb\n", "l", "not a plain path"),
        (f"{MD5}  a\rb\n", "l", "not a plain path"),
        (f"\\{MD5}  a\\nb\n", "l", "not a plain path"),
        (f"\\{MD5}  a\\\\b\n", "l", "not a plain path"),
        (f"\\{MD5}  a\\tb\n", "l", "unknown escape"),
        (f"\\{MD5}  a\\\n", "l", "unknown escape"),
        (f"{MD5}  l\n", "l", "names itself"),
        (f"{MD5[:-1]}  a\n", "l", "no digest that we know has 31 digits"),
        (f"{MD5}  a\n{SHA256}  b\n", "l", "64 digits, the lines before have 32"),
        (f"{SHA256}  a\n", "x.md5", r"expected 32 digits \(md5\), found 64"),
        (f"{SHA256}  a\n", "checklist.chk", r"expected 32 digits \(md5\), found 64"),
        (f"{MD5}  a\n", "SHA256SUMS", r"expected 64 digits \(sha256\), found 32"),
        (f"{SHA256}  a\n", "XXH128SUMS", r"expected 32 digits \(xxh3_128\), found 64"),
        (f"XXH128 (a) = {XXH}\n", "MD5SUMS", "expected md5, found a XXH128 digest"),
        (f"MD5 (a) = {MD5}\n", "XXH128SUMS", "expected xxh3_128, found a MD5 digest"),
        (f"XXH3_{XXH3}  a\n", "x.xxh64", "expected xxh64, found a XXH3 digest"),
        (f"MD5 (a) = {SHA256}\n", "l", "a MD5 digest has 32 digits, found 64"),
        (f"XXH128_LE (a) = {XXH}\n", "l", "expected a digest"),
        (f"TIGER (a) = {MD5}\n", "l", "unknown algorithm TIGER"),
    ],
)
def test_refused(text: str, list_name: str, message: str) -> None:
    with pytest.raises(CorruptInput, match=message) as caught:
        parse(text, list_name)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("data", [f"{MD5}  a\n".encode("utf-16"), f"{MD5}  ".encode() + b"\xff\n"])
def test_not_utf8(data: bytes) -> None:
    with pytest.raises(CorruptInput, match="not UTF-8 at byte"):
        parse_checksums(data, "l", "l")


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "XXH128SUMS"
    path.write_text(f"{XXH}  a\n")
    assert read_checksums(path) == ChecksumList(str(path), (ChecksumEntry("a", "xxh3_128", XXH),))
    with pytest.raises(SourceMissing):
        read_checksums(tmp_path / "absent")


@pytest.mark.parametrize("name", ["MD5SUMS", "a.sha256", "checklist.chk", "X.XXH128", "SHA256SUMS.txt", "b3sums"])
def test_names_of_lists(name: str) -> None:
    assert is_checksum_list(name)


@pytest.mark.parametrize("name", ["md5.py", "model.bin", "config.json", "resnet_b3.bin", "a.txt", "MD5", "sums"])
def test_other_names(name: str) -> None:
    assert not is_checksum_list(name)


def test_render() -> None:
    entries = [ChecksumEntry("a b", "md5", MD5), ChecksumEntry("n\nl\\r\r", "md5", XXH)]
    assert render_gnu(entries).decode() == f"{MD5}  a b\n\\{XXH}  n\\nl\\\\r\\r\n"
    assert render_gnu([ChecksumEntry("a", "xxh3_64", XXH3)]) == f"XXH3_{XXH3}  a\n".encode()
    with pytest.raises(UsageError, match="several algorithms: md5, sha256"):
        render_gnu([ChecksumEntry("a", "md5", MD5), ChecksumEntry("a", "sha256", SHA256)])


def plain(name: str) -> bool:
    try:
        return check_relative(name, "test") == name
    except CorruptInput:
        return False


file_names = st.text(st.sampled_from("ab \\\n\r*()=#é模/.") | st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(st.lists(file_names, min_size=1, unique=True), st.sampled_from(sorted(HEX_DIGITS)))
def test_round_trip(names: list[str], algorithm: str) -> None:
    """Every name survives the escaping; those that are no plain path are refused, and only those."""
    entries = tuple(ChecksumEntry(name, algorithm, "0f" * (HEX_DIGITS[algorithm] // 2)) for name in names)
    data = render_gnu(entries)
    assert data.count(b"\n") == len(names)
    if all(map(plain, names)):
        assert parse_checksums(data, "list", "\0", algorithm) == entries
    else:
        with pytest.raises(CorruptInput):
            parse_checksums(data, "list", "\0", algorithm)


@given(file_names)
def test_escaping_is_reversible(name: str) -> None:
    line = render_gnu([ChecksumEntry(name, "md5", MD5)]).decode().removesuffix("\n")
    shown = line.removeprefix("\\").removeprefix(f"{MD5}  ")
    assert (_unescape(shown, "test") if line.startswith("\\") else shown) == name


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        entries = parse_checksums(data, "list", "list")
    except CorruptInput:
        return
    assert all(plain(e.name) and len(e.hex) == HEX_DIGITS[e.algorithm] for e in entries)


NAMES = [
    "plain.bin",
    "with space",
    " leading",
    "*star",
    "模型.bin",
    "back\\slash",
    "new\nline",
    "carriage\rreturn",
    "(x) = y",
]


@pytest.mark.parametrize(("tool", "algorithm"), [("md5sum", "md5"), ("sha256sum", "sha256"), ("b2sum", "blake2b")])
def test_coreutils_both_ways(tmp_path: Path, tool: str, algorithm: str) -> None:
    for name in NAMES:
        (tmp_path / name).write_text(name)
    entries = [
        ChecksumEntry(name, algorithm, hash_file(tmp_path / name, [algorithm]).digests[algorithm]) for name in NAMES
    ]
    rendered = render_gnu(entries)
    printed = subprocess.run([tool, "--", *NAMES], cwd=tmp_path, capture_output=True, check=True).stdout
    assert rendered == printed
    subprocess.run([tool, "-c", "--strict", "--quiet"], cwd=tmp_path, input=rendered, check=True)
    ours = [name for name in NAMES if plain(name)]
    for options in ([], ["-b"], ["--tag"]):
        printed = subprocess.run([tool, *options, "--", *ours], cwd=tmp_path, capture_output=True, check=True).stdout
        assert list(parse_checksums(printed, "list", "list", algorithm)) == [e for e in entries if e.name in ours]


@pytest.mark.skipif(shutil.which("xxhsum") is None, reason="xxhsum is not installed")
@pytest.mark.parametrize(("option", "algorithm"), [("-H2", "xxh3_128"), ("-H1", "xxh64"), ("-H3", "xxh3_64")])
def test_xxhsum_both_ways(tmp_path: Path, option: str, algorithm: str) -> None:
    (tmp_path / "a b").write_bytes(b"hello\n")
    entry = ChecksumEntry("a b", algorithm, hash_file(tmp_path / "a b", [algorithm]).digests[algorithm])
    for tag in ([], ["--tag"]):
        printed = subprocess.run(["xxhsum", option, *tag, "a b"], cwd=tmp_path, capture_output=True, check=True).stdout
        assert parse_checksums(printed, "list", f"x.{algorithm}") == (entry,)
    if algorithm == "xxh3_64":
        return  # xxhsum reads its `XXH3_` prefix since 0.8.2 only
    rendered = render_gnu([entry])
    assert rendered == subprocess.run(["xxhsum", option, "a b"], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "list").write_bytes(rendered)
    subprocess.run(["xxhsum", "-c", "list"], cwd=tmp_path, check=True, capture_output=True)


def test_golden_digests() -> None:
    assert hashlib.md5(b"hello\n").hexdigest() == MD5
    assert hashlib.sha256(b"hello\n").hexdigest() == SHA256
