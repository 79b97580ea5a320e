"""Bundles of model signing as they are read, before anything in them is believed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import CorruptInput, WeightopsError
from weightops.formats.proofs.bundle import Part, SignedFile, read_bundle

A, B = (hashlib.sha256(each).hexdigest() for each in (b"a", b"b"))


def encoded(document: Any) -> str:
    return base64.b64encode(json.dumps(document).encode()).decode()


def statement(resources: list[dict[str, str]], **serialization: Any) -> dict[str, Any]:
    subject = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": subject}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", **serialization},
            "resources": resources,
        },
    }


def bundle(content: Any) -> dict[str, Any]:
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": encoded(content),
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": "AAAA", "keyid": ""}],
        },
    }


def file(name: str, digest: str = A, algorithm: str = "sha256") -> dict[str, str]:
    return {"name": name, "algorithm": algorithm, "digest": digest}


def shards(*names: str) -> dict[str, Any]:
    resources = [file(name, algorithm="sha256-sharded-10") for name in names]
    return statement(resources, method="shards", shard_size=10)


def read(document: Any) -> Any:
    return read_bundle(json.dumps(document).encode(), "model.sig")


def test_files_and_ranges_are_read() -> None:
    assert read(bundle(statement([file("a"), file("d/b", B)]))).files == {
        "a": SignedFile("sha256", (Part(0, None, A),)),
        "d/b": SignedFile("sha256", (Part(0, None, B),)),
    }
    found = read(bundle(shards("a:10:15", "a:0:10", "b:0:10"))).files
    assert found["a"] == SignedFile("sha256", (Part(0, 10, A), Part(10, 15, A)))
    assert (found["a"].nbytes, found["b"].nbytes) == (15, 10)


def test_a_list_of_the_first_version_has_a_subject_for_each_file() -> None:
    subjects = [{"name": name, "digest": {"sha256": digest}} for name, digest in (("a", A), ("b", B))]
    old = {"_type": "https://in-toto.io/Statement/v1", "subject": subjects, "predicateType": ""}
    old["predicateType"] = "https://model_signing/Digests/v0.1"
    found = read(bundle(old))
    assert {name: each.parts[0].digest for name, each in found.files.items()} == {"a": A, "b": B}


def outside(**fields: Any) -> Callable[[], Any]:
    return lambda: bundle(statement([file("a")])) | fields


def envelope(**fields: Any) -> Callable[[], Any]:
    made = bundle(statement([file("a")]))
    return lambda: made | {"dsseEnvelope": made["dsseEnvelope"] | fields}


def inside(**fields: Any) -> Callable[[], Any]:
    return lambda: bundle(statement([file("a")]) | fields)


def listing(*resources: dict[str, str], **serialization: Any) -> Callable[[], Any]:
    return lambda: bundle(statement([*resources], **serialization))


MATERIAL = {"verificationMaterial": {"tlogEntries": []}}
CHAIN = {"verificationMaterial": {"x509CertificateChain": {"certificates": [{"rawBytes": "!"}]}}}
HOSTILE = {
    "another media type": (outside(mediaType="text/plain"), "its media type is 'text/plain', expected"),
    "no envelope": (outside(dsseEnvelope=None), "no bundle of model signing"),
    "neither key nor certificate": (outside(**MATERIAL), "neither of a key nor of a certificate"),
    "a certificate that is none": (outside(**CHAIN), "its certificate is not base64"),
    "another payload": (envelope(payloadType="text/plain"), "its payload type is 'text/plain'"),
    "a payload that is no text": (envelope(payload="!"), "its payload is not base64"),
    "a payload that is no JSON": (envelope(payload="AAAA"), "the signed statement: not JSON at character 0"),
    "a payload that is a list": (envelope(payload=encoded([])), "expected a JSON object, found list"),
    "no signature": (envelope(signatures=[]), "has 0 signatures, expected one"),
    "two signatures": (envelope(signatures=[{"sig": ""}] * 2), "has 2 signatures, expected one"),
    "another statement": (inside(_type="x"), "its statement is 'x', expected"),
    "another predicate": (inside(predicateType="x"), "its predicate is 'x', expected"),
    "no list": (inside(predicate={}), "no bundle of model signing .*serialization"),
    "no models": (inside(subject=[]), "speaks of 0 models, expected one"),
    "another subject": (inside(subject=[{"name": "m", "digest": {"sha256": B}}]), "its subject is not the list"),
    "a short digest": (listing(file("a", A[:-2])), "for 'a' is no sha256 digest"),
    "a long digest": (listing(file("a", A * 2)), "for 'a' is no sha256 digest"),
    "a digest in capitals": (listing(file("a", A.upper())), "for 'a' is no sha256 digest"),
    "another algorithm": (listing(file("a", algorithm="md5")), "'a' has a md5 digest, not sha256"),
    "an unknown algorithm": (listing(file("a"), hash_type="md5"), "has md5 digests, expected one of sha256"),
    "a name twice": (listing(file("a"), file("a", B)), "lists 'a' twice"),
    "a way out": (listing(file("../a")), "'../a' is not a plain path inside the folder"),
    "an absolute name": (listing(file("/etc/passwd")), "is not a plain path inside the folder"),
    "a name that moves the cursor": (listing(file("a\x1b[2J")), "is not a plain path inside the folder"),
    "no name": (listing(file("")), "is not a plain path inside the folder"),
    "a single file with others": (listing(file("."), file("a")), "lists a single file, and others beside it"),
    "an unknown method": (listing(file("a"), method="dance"), "by the method 'dance', expected files or shards"),
    "parts of no size": (listing(file("a:0:1"), method="shards"), "by the method 'shards'"),
    "a range that is none": (lambda: bundle(shards("a")), "'a' is no range of a file"),
    "a range of words": (lambda: bundle(shards("a:0:x")), "'a:0:x' is no range of a file"),
    "a range below zero": (lambda: bundle(shards("a:-1:9")), "is no range of a file"),
    "a gap": (lambda: bundle(shards("a:0:10", "a:20:30")), "'a' leave a gap, or overlap, at byte 10"),
    "a late start": (lambda: bundle(shards("a:10:20")), "'a' leave a gap, or overlap, at byte 0"),
    "an overlap": (lambda: bundle(shards("a:0:10", "a:0:10")), "'a' leave a gap, or overlap, at byte 10"),
    "a large part": (lambda: bundle(shards("a:0:11")), "'a' leave a gap, or overlap, at byte 0"),
    "a small part that is not the last": (lambda: bundle(shards("a:0:5", "a:5:15")), "at byte 0"),
    "an empty part": (lambda: bundle(shards("a:0:0")), "at byte 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_bundle_is_refused_in_a_sentence(name: str) -> None:
    make, message = HOSTILE[name]
    with pytest.raises(CorruptInput, match=f"^model.sig.*{message}"):
        read(make())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON at character 0"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"mediaType": 1, "mediaType": 2}', "the key 'mediaType' occurs twice"),
        (b'"' + b"x" * 100_000_001 + b'"', "at most 100000000 are read"),
    ],
)
def test_what_is_no_document_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CorruptInput, match=message):
        read_bundle(data, "model.sig")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@given(JSON, st.sampled_from(["subject", "predicate", "predicateType", "_type"]))
def test_nothing_in_a_statement_is_more_than_an_error(value: Any, field: str) -> None:
    with suppress(WeightopsError):
        read(bundle(statement([file("a")]) | {field: value}))
