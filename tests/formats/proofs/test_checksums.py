from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.formats.proofs.checksums import (
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
SIGNED = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n"
SIGNATURE = "-----BEGIN PGP SIGNATURE-----\n\nxyz\n-----END PGP SIGNATURE-----\n"


def parse(text: str, list_name: str = "list", algorithm: str | None = None) -> list[tuple[str, str, str]]:
    entries = parse_checksums(text.encode(), list_name, list_name, algorithm).entries
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
        (f"{MD5}  ././a", ("a", "md5", MD5)),
        (f"{MD5}  ./sub/.//./a", ("sub/a", "md5", MD5)),
        (f"{MD5}\ta", ("a", "md5", MD5)),
        (f"{MD5}\t a", ("a", "md5", MD5)),
        (f"  \t{MD5}  a", ("a", "md5", MD5)),
        (f"  \\{MD5}  a", ("a", "md5", MD5)),
        (f"MD5(a)= {MD5}", ("a", "md5", MD5)),
        (f"SHA2-256(a)= {SHA256}", ("a", "sha256", SHA256)),
        (f"BLAKE2B-512(a)= {SHA256}{SHA256}", ("a", "blake2b", SHA256 * 2)),
        (f"BLAKE2b-256 (a) = {SHA256}", ("a", "blake2b-256", SHA256)),
        (f"SHA384 (a) = {SHA256}{MD5}", ("a", "sha384", SHA256 + MD5)),
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
    around = f"\n# from where\n\n{line}\n \n\r\n{line}\n"
    assert parse(line) == parse(f"{line}\n") == parse(around) == parse(f"{SIGNED}\n{line}\n{SIGNATURE}") == [expected]


def test_what_is_passed_over_is_said() -> None:
    found = parse_checksums(f"{MD5}  a\n{XXH}  ./l\n".encode(), "x/l", "l")
    assert [entry.name for entry in found.entries] == ["a"]
    assert found.notes == ("x/l: line 2: the line for the list itself is passed over",)
    assert parse_checksums(f"{MD5}  a\n{XXH}  s/l\n".encode(), "s/l", "l", own="s/l").notes
    assert "was not checked" in parse_checksums(f"{SIGNED}\n{MD5}  a\n{SIGNATURE}".encode(), "l", "l").notes[0]


def test_dashes_at_the_beginning_of_a_signed_line_are_escaped() -> None:
    assert parse(f"{SIGNED}\n- # ----\n{MD5}  a\n{SIGNATURE}") == [("a", "md5", MD5)]


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
        ("B2SUMS", SHA256, "blake2b-256"),
        ("x.blake2b", MD5, "blake2b-128"),
        ("SHA384SUMS", SHA256 + MD5, "sha384"),
        ("anything.txt", SHA256 + MD5, "sha384"),
        ("SHA224SUMS", SHA256[:56], "sha224"),
        ("SHA256SUMS.asc", SHA256, "sha256"),
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
        (f"{MD5}  \n", "l", "line 1"),
        ("<!doctype html>\n", "l", "line 1: expected a digest"),
        ("\x1b[2J\n", "l", r"found '\\\\x1b\[2J'"),
        (f"{MD5}  a\n{XXH}  a\n", "l", "line 2: 'a' is listed twice, with two md5 digests"),
        (f"{MD5}  ./a\n{XXH}  a\n", "l", "line 2: 'a' is listed twice"),
        (f"MD5 (a) = {XXH}\n{MD5}  a\n", "l", "listed twice"),
        (f"my model, v1\n{MD5}  a\n", "l", "line 1: expected a digest and a file name, found 'my model, v1'"),
        (f"{MD5}\n", "l", "line 1: expected a digest"),
        (f"{MD5} a.bin\n{MD5}  b\n{XXH[:31]} c\n", "l", "31 digits, the lines before have 32"),
        (f"HMAC-SHA256(a)= {SHA256}\n", "l", "unknown algorithm HMAC-SHA256"),
        (f"BLAKE2b-256 (a) = {MD5}\n", "l", "a BLAKE2b-256 digest has 64 digits, found 32"),
        (f"{'a' * 31}  a\n", "B2SUMS", r"expected 128 digits \(blake2b\), found 31"),
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
        (f"{MD5}  l\n", "l", "lists no files"),
        (f"{MD5}  /./a\n", "l", "not a plain path"),
        (f"{MD5}  .//../a\n", "l", "not a plain path"),
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
        (f"{SIGNED}\n{MD5}  a\n", "l", "ends in the middle of a signed message"),
        (f"{SIGNED}\n{MD5}  a\n-----BEGIN PGP SIGNATURE-----\n", "l", "ends in the middle"),
        (f"{SIGNED}\n{MD5}  a\n{SIGNATURE}{MD5}  b\n", "l", "line 9: '.*  b' is not covered by the signature"),
        (f"{MD5}  b\n{SIGNED}\n{MD5}  a\n{SIGNATURE}", "l", "line 1: '.*  b' is not covered"),
        (f"{SIGNED}{MD5}  b\n\n{MD5}  a\n{SIGNATURE}", "l", "line 3: expected a header"),
        (SIGNATURE, "l", "line 1: .* is not covered"),
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
    with pytest.raises(SourceMissing, match="no such file"):
        read_checksums(tmp_path / "absent")


@pytest.mark.parametrize("name", ["MD5SUMS", "a.sha256", "checklist.chk", "X.XXH128", "SHA256SUMS.txt.asc", "b3sums"])
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


@pytest.mark.parametrize("name", [" ", "  ", " a", "a "])
def test_names_of_blanks_survive(name: str) -> None:
    entry = ChecksumEntry(name, "md5", MD5)
    assert parse_checksums(render_gnu([entry]), "list", "\0", "md5").entries == (entry,)
    with pytest.raises(CorruptInput, match="expected a digest and a file name"):
        parse_checksums(f"{MD5}  \n".encode(), "list", "\0", "md5")


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
        assert parse_checksums(data, "list", "\0", algorithm).entries == entries
    else:
        with pytest.raises(CorruptInput, match="is not a plain path inside the folder"):
            parse_checksums(data, "list", "\0", algorithm)


@given(file_names)
def test_escaping_is_reversible(name: str) -> None:
    line = render_gnu([ChecksumEntry(name, "md5", MD5)]).decode().removesuffix("\n")
    shown = line.removeprefix("\\").removeprefix(f"{MD5}  ")
    assert (_unescape(shown, "test") if line.startswith("\\") else shown) == name


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        entries = parse_checksums(data, "list", "list").entries
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
        found = parse_checksums(printed, "list", "list", algorithm).entries
        assert list(found) == [entry for entry in entries if entry.name in ours]


CHECKED = {
    "empty line": "{a}  a.bin\n\n{b}  b.bin\n",
    "the same line twice": "{a}  a.bin\n{b}  b.bin\n{a}  a.bin\n",
    "tabs": "{a}\ta.bin\n{b}\tb.bin\n",
    "indented": "  {a}  a.bin\n\t{b} *b.bin\n",
    "dots and slashes": "{a}  ././a.bin\n{b}  .//b.bin\n",
    "one blank": "{a} a.bin\n{b} b.bin\n",
    "one blank, and names that begin with one": "{a} a.bin\n{b}  c.bin\n",
    "comments": "# a\n{a}  a.bin\n# b\n{b}  b.bin\n",
    "CRLF": "{a}  a.bin\r\n{b} *b.bin\r\n",
    "upper case": "{A}  a.bin\n",
    "openssl": "{TAG}(a.bin)= {a}\n{TAG}(b.bin)= {b}\n",
    "bsd": "{TAG} (a.bin) = {a}\n{TAG} (b.bin) = {b}\n",
    "bsd, loosely": "  {TAG} (a.bin)={a}\n",
}


@pytest.mark.parametrize(
    ("tool", "tag"), [("md5sum", "MD5"), ("sha256sum", "SHA256"), ("sha384sum", "SHA384"), ("b2sum", "BLAKE2b")]
)
@pytest.mark.parametrize("case", CHECKED)
def test_lists_that_coreutils_check_are_read(tmp_path: Path, case: str, tool: str, tag: str) -> None:
    names = {"a.bin": "a", "b.bin": "b", " c.bin": "b"}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    printed = subprocess.run([tool, "a.bin", "b.bin"], cwd=tmp_path, capture_output=True, check=True, text=True).stdout
    a, b = (line.split()[0] for line in printed.splitlines())
    data = CHECKED[case].format(a=a, b=b, A=a.upper(), TAG=tag).encode()
    checked = subprocess.run([tool, "-c", "--strict"], cwd=tmp_path, input=data, capture_output=True, check=True).stdout
    expected = {Path(line.removesuffix(": OK")).as_posix() for line in checked.decode().splitlines()}
    found = parse_checksums(data, "list", f"{tag.upper().replace('BLAKE2B', 'B2')}SUMS")
    assert {entry.name for entry in found.entries} == expected
    assert {entry.hex for entry in found.entries} <= {a, b}


def test_a_list_that_gpg_signed(tmp_path: Path) -> None:
    if shutil.which("gpg") is None:
        pytest.skip("gpg is not installed")
    (tmp_path / "a.bin").write_text("hello\n")
    text = f"- not a digest\n{SHA256}  a.bin\n"
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(keys), "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    made = subprocess.run([*gpg, "--quick-gen-key", "tester", "ed25519", "sign"], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("gpg makes no key here")
    signed = subprocess.run([*gpg, "--clearsign"], input=text.encode(), capture_output=True, check=True).stdout
    subprocess.run(["gpgconf", "--homedir", str(keys), "--kill", "all"], check=False)
    with pytest.raises(CorruptInput, match="found '- not a digest'"):
        parse_checksums(signed, "SHA256SUMS.asc", "SHA256SUMS.asc")
    signed = signed.replace(b"- - not a digest\n", b"")
    assert parse_checksums(signed, "l", "SHA256SUMS.asc").entries == (ChecksumEntry("a.bin", "sha256", SHA256),)


@pytest.mark.skipif(shutil.which("xxhsum") is None, reason="xxhsum is not installed")
@pytest.mark.parametrize(("option", "algorithm"), [("-H2", "xxh3_128"), ("-H1", "xxh64"), ("-H3", "xxh3_64")])
def test_xxhsum_both_ways(tmp_path: Path, option: str, algorithm: str) -> None:
    (tmp_path / "a b").write_bytes(b"hello\n")
    entry = ChecksumEntry("a b", algorithm, hash_file(tmp_path / "a b", [algorithm]).digests[algorithm])
    for tag in ([], ["--tag"]):
        printed = subprocess.run(["xxhsum", option, *tag, "a b"], cwd=tmp_path, capture_output=True, check=True).stdout
        assert parse_checksums(printed, "list", f"x.{algorithm}").entries == (entry,)
    if algorithm == "xxh3_64":
        return  # xxhsum reads its `XXH3_` prefix since 0.8.2 only
    rendered = render_gnu([entry])
    assert rendered == subprocess.run(["xxhsum", option, "a b"], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "list").write_bytes(rendered)
    subprocess.run(["xxhsum", "-c", "list"], cwd=tmp_path, check=True, capture_output=True)


def test_golden_digests() -> None:
    assert hashlib.md5(b"hello\n").hexdigest() == MD5
    assert hashlib.sha256(b"hello\n").hexdigest() == SHA256
