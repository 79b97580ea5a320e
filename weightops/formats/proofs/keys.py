"""Keys and certificates in files, as `cryptography` reads them, with errors that name the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weightops.errors import AuthenticationFailed, CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.stores.local import read_source

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_KEYS = "of the elliptic curves P-256, P-384 and P-521, in PEM"
Value = TypeVar("Value")


def _read(path: Path, what: str, load: Callable[[bytes], Value]) -> Value:
    """What a small file holds, by a function of `cryptography`; raises `CorruptInput` if it is not what is expected."""
    data = read_source(path)[1]
    try:
        return load(data)
    except Exception:
        private = b"PRIVATE KEY" in data
        raise CorruptInput(
            f"{escape(str(path))}: is no {what}",
            hint="this is a private key, which nobody else should have: give the public one" if private else None,
        ) from None


def public_key(path: Path) -> Any:
    """The public key in a PEM file; raises `SourceMissing`, and `CorruptInput` for what is none of these curves."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _checked(_read(path, f"public key {_KEYS}", load_pem_public_key), path)


def private_key(path: Path, password: bytes | None) -> Any:
    """The private key in a PEM file.

    Raises as `public_key` does, `UsageError` if it lacks a password or needs none, `AuthenticationFailed` for a wrong
    one.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = read_source(path)[1]
    shown = escape(str(path))
    try:
        return _checked(load_pem_private_key(data, password), path)
    except TypeError:
        raise UsageError(
            f"{shown}: is locked with a password" if password is None else f"{shown}: has no password",
            hint="name a file that holds it: --password-file FILE" if password is None else "leave the password out",
        ) from None
    except ValueError:
        if password is not None:
            raise AuthenticationFailed(f"{shown}: is no private key, or has another password") from None
        raise CorruptInput(f"{shown}: is no private key {_KEYS}") from None


def _checked(key: Any, path: Path) -> Any:
    """Refuse keys of other kinds than those that bundles have."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES:
        found = f"one of the curve {curve}" if curve else "a key of another kind"
        raise CorruptInput(f"{escape(str(path))}: is {found}, expected one {_KEYS}")
    return key


def fingerprint(public_key: Any) -> str:
    """What a bundle says of its key: the SHA-256 of the public key in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(pem).hexdigest()}"


def certificates(path: Path) -> list[Certificate]:
    """The certificates in a PEM file, at least one; raises as `public_key` does."""
    from cryptography.x509 import load_pem_x509_certificates

    return _read(path, "certificate in PEM", load_pem_x509_certificates)


def certificate_of(data: bytes, shown: str) -> Certificate:
    """A certificate from DER; raises `CorruptInput`, beginning with `shown`."""
    from cryptography.x509 import load_der_x509_certificate

    try:
        return load_der_x509_certificate(data)
    except ValueError:
        raise CorruptInput(f"{shown}: a certificate in it is cut off or damaged") from None


def name_of(certificate: Certificate) -> str:
    """Whose certificate it is, in words."""
    return f"certificate {escape(certificate.subject.rfc4514_string())}"


def identity_of(certificate: Certificate) -> str:
    """Whom Sigstore made a certificate for: the address or URL in it."""
    from cryptography.x509 import ExtensionNotFound, SubjectAlternativeName

    try:
        names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    except ExtensionNotFound:
        return name_of(certificate)
    return ", ".join(escape(str(name.value)) for name in names)
