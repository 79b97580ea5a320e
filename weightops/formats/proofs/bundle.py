"""Bundles of OpenSSF model signing: which files somebody signed, with which digests.

A JSON file in layers: a Sigstore bundle (https://docs.sigstore.dev/about/bundle/) of version 0.3 holds a DSSE envelope
(https://github.com/secure-systems-lab/dsse), this an in-toto statement
(https://github.com/in-toto/attestation/tree/main/spec/v1), and this the list of files that model-signing 1.1 makes
(https://github.com/sigstore/model-transparency, `_signing/signing.py` and `manifest.py`). Here it is only read: who
has signed it `signers` finds out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from weightops.errors import CorruptInput
from weightops.io import strict_json
from weightops.io.digests import HEX_DIGITS
from weightops.io.escape import escape
from weightops.io.paths import check_relative

NAME = "model.sig"
"""What model-signing calls a bundle, and so do we."""
SINGLE = "."
"""What it calls the file of a model that is a single one."""
GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""What it never signs at the top of a folder, unless it is told to."""
ALGORITHMS = {"sha256": "sha256", "blake2b": "blake2b", "blake3": "b3"}
"""Our names of the digests, by its own."""
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_SIGNATURE = "https://model_signing/signature/v1.0"
_DIGESTS = "https://model_signing/Digests/v0.1"
"""The list of model-signing 0.2: a subject for each file."""

Kind = Literal["key", "certificate", "identity"]
Shape = TypeVar("Shape")


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file from `start` to before `stop`, or to its end, and their digest in hexadecimal digits."""

    start: int
    stop: int | None
    digest: str


@dataclass(frozen=True, slots=True)
class SignedFile:
    """A file of a bundle: its parts in order, without gaps, and the algorithm of their digests."""

    algorithm: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int | None:
        """The file's size, which only a bundle with parts tells."""
        return self.parts[-1].stop


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a bundle says. `kind` is what it is signed with, `name` what the folder was called then.

    `method` is how the files were listed, as model-signing has it; `certificates` are those in the bundle, in DER.
    """

    kind: Kind
    name: str
    files: Mapping[str, SignedFile]
    method: Mapping[str, Any]
    certificates: tuple[bytes, ...] = ()


class _Certificate(msgspec.Struct, rename="camel"):
    raw_bytes: str


class _Chain(msgspec.Struct):
    certificates: list[_Certificate]


class _Material(msgspec.Struct, rename="camel"):
    public_key: dict[str, Any] | None = None
    x509_certificate_chain: _Chain | None = None
    certificate: _Certificate | None = None


class _OneSignature(msgspec.Struct):
    sig: str


class _Envelope(msgspec.Struct, rename="camel"):
    payload: str
    payload_type: str
    signatures: list[_OneSignature]


class _Outside(msgspec.Struct, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Subject(msgspec.Struct):
    name: str
    digest: dict[str, str]


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: str


class _Serialization(msgspec.Struct):
    method: str
    hash_type: str
    shard_size: float = 0  # a Struct of protobuf has no integers, and writes 10.0
    allow_symlinks: bool = False
    ignore_paths: list[str] = []

    @property
    def nbytes(self) -> int:
        """How large parts are; 0 for what can be no size."""
        return int(self.shard_size) if self.shard_size >= 1 and self.shard_size.is_integer() else 0

    def to_arguments(self) -> dict[str, Any]:
        """The same as model-signing takes it."""
        return {**msgspec.to_builtins(self), "shard_size": self.nbytes}


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: list[_Resource]


class _Statement(msgspec.Struct, rename="camel"):
    type: str = msgspec.field(name="_type")
    subject: list[_Subject]
    predicate_type: str
    predicate: msgspec.Raw | dict[str, Any] | None = None


def read_bundle(data: bytes, shown: str) -> Bundle:
    """What the bytes of a bundle say.

    Raises `CorruptInput`, beginning with `shown`, for anything that model-signing does not write, and for lists that
    contradict themselves: names twice or outside the folder, digests of other lengths, parts that leave gaps, a
    subject that is not the digest of the list.
    """
    outside = _convert(strict_json.load_object(data, shown), _Outside, shown)
    _expect("media type", outside.media_type, _MEDIA_TYPE, shown)
    envelope = outside.dsse_envelope
    _expect("payload type", envelope.payload_type, _PAYLOAD_TYPE, shown)
    if len(envelope.signatures) != 1:
        raise CorruptInput(f"{shown}: has {len(envelope.signatures)} signatures, expected one")
    _decoded(envelope.signatures[0].sig, "signature", shown)
    kind, certificates = _material(outside.verification_material, shown)
    payload = strict_json.load_object(_decoded(envelope.payload, "payload", shown), f"{shown}, the signed statement")
    statement = _convert(payload, _Statement, shown)
    _expect("statement", statement.type, _STATEMENT, shown)
    if statement.predicate_type == _DIGESTS:
        return _of_subjects(statement.subject, kind, certificates, shown)
    _expect("predicate", statement.predicate_type, _SIGNATURE, shown)
    if len(statement.subject) != 1:
        raise CorruptInput(f"{shown}: speaks of {len(statement.subject)} models, expected one")
    predicate = _convert(statement.predicate, _Predicate, shown)
    (subject,) = statement.subject
    files = _files(predicate, shown)
    _check_subject(subject, predicate.resources, shown)
    return Bundle(kind, subject.name, files, predicate.serialization.to_arguments(), certificates)


def _convert(value: Any, shape: type[Shape], shown: str) -> Shape:
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise CorruptInput(f"{shown}: no bundle of model signing ({escape(str(error))})") from None


def _expect(what: str, found: str, expected: str, shown: str) -> None:
    if found != expected:
        raise CorruptInput(f"{shown}: its {what} is {escape(found)!r}, expected {expected!r}")


def _decoded(text: str, what: str, shown: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise CorruptInput(f"{shown}: its {what} is not base64") from None


def _material(material: _Material, shown: str) -> tuple[Kind, tuple[bytes, ...]]:
    """What the bundle is signed with, and the certificates in it."""
    chain = material.x509_certificate_chain
    if chain is not None and chain.certificates:
        return "certificate", tuple(_decoded(each.raw_bytes, "certificate", shown) for each in chain.certificates)
    if material.certificate is not None:
        return "identity", (_decoded(material.certificate.raw_bytes, "certificate", shown),)
    if material.public_key is not None:
        return "key", ()
    raise CorruptInput(f"{shown}: says neither of a key nor of a certificate what it is signed with")


def _files(predicate: _Predicate, shown: str) -> dict[str, SignedFile]:
    how = predicate.serialization
    if how.method not in ("files", "shards") or (how.method == "shards" and not how.nbytes):
        raise CorruptInput(f"{shown}: lists files by the method {escape(how.method)!r}, expected files or shards")
    if how.hash_type not in ALGORITHMS:
        raise CorruptInput(
            f"{shown}: has {escape(how.hash_type)} digests, expected one of {', '.join(ALGORITHMS)}",
        )
    of_parts = how.method == "shards"
    named = f"{how.hash_type}-sharded-{how.nbytes}" if of_parts else how.hash_type
    parts: dict[str, list[Part]] = {}
    for each in predicate.resources:
        if each.algorithm != named:
            raise CorruptInput(f"{shown}: {escape(each.name)!r} has a {escape(each.algorithm)} digest, not {named}")
        name, part = _part(each, shown) if of_parts else (each.name, Part(0, None, each.digest))
        _check_digest(each.name, part.digest, how.hash_type, shown)
        parts.setdefault(name, []).append(part)
    for name, found in parts.items():
        _check_name(name, parts, shown)
        if len(found) > 1 and not of_parts:
            raise CorruptInput(f"{shown}: lists {escape(name)!r} twice")
        if of_parts:
            found.sort(key=lambda part: part.start)
            _check_parts(name, found, how.nbytes, shown)
    return {name: SignedFile(ALGORITHMS[how.hash_type], tuple(found)) for name, found in parts.items()}


def _part(resource: _Resource, shown: str) -> tuple[str, Part]:
    """A range of a file, from `name:start:stop`."""
    name, *numbers = resource.name.split(":")
    if len(numbers) != 2 or not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise CorruptInput(f"{shown}: {escape(resource.name)!r} is no range of a file, as in name:0:1000000000")
    return name, Part(int(numbers[0]), int(numbers[1]), resource.digest)


def _check_name(name: str, names: Mapping[str, Any], shown: str) -> None:
    if name != SINGLE:
        check_relative(name, shown)
    elif len(names) > 1:
        raise CorruptInput(f"{shown}: lists a single file, and others beside it")


def _check_digest(name: str, digest: str, algorithm: str, shown: str) -> None:
    if len(digest) != HEX_DIGITS[ALGORITHMS[algorithm]] or digest.strip("0123456789abcdef"):
        raise CorruptInput(f"{shown}: {escape(digest)!r} for {escape(name)!r} is no {algorithm} digest")


def _check_parts(name: str, parts: Sequence[Part], nbytes: int, shown: str) -> None:
    """Refuse ranges that are not one after the other, each of the size that all have, and the last of what is left."""
    at = 0
    for part in parts:
        size = (part.stop or 0) - at
        if part.start != at or not 0 < size <= nbytes or (size < nbytes and part is not parts[-1]):
            raise CorruptInput(f"{shown}: the ranges of {escape(name)!r} leave a gap, or overlap, at byte {at}")
        at += nbytes


def _check_subject(subject: _Subject, resources: Sequence[_Resource], shown: str) -> None:
    """Refuse a statement about something else than its list: the subject is the digest of all digests, in order."""
    state = hashlib.sha256()
    for each in resources:
        state.update(bytes.fromhex(each.digest))
    if subject.digest.get("sha256") != state.hexdigest():
        raise CorruptInput(f"{shown}: its subject is not the list of files that it holds")


def _of_subjects(subjects: Sequence[_Subject], kind: Kind, certificates: tuple[bytes, ...], shown: str) -> Bundle:
    """The list of model-signing 0.2, which says nothing of how it was made."""
    resources = [_Resource(each.name, "sha256", each.digest.get("sha256", "")) for each in subjects]
    how = _Serialization("files", "sha256")
    files = _files(_Predicate(how, resources), shown)
    return Bundle(kind, "", files, how.to_arguments(), certificates)
