"""Keys and certificates to sign with, and model-signing's own command line."""

from __future__ import annotations

import base64
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("model_signing", reason="needs the extra sign: model-signing and pyOpenSSL")
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID


def save_key(folder: Path, name: str, curve: ec.EllipticCurve | None = None, password: bytes | None = None) -> Any:
    """A new pair of keys as NAME.key and NAME.pub."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    locked = BestAvailableEncryption(password) if password else NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return key


def save_certificate(folder: Path, name: str, key: Any, issuer: tuple[x509.Certificate, Any] | None = None) -> Any:
    """A certificate for a key as NAME.pem: of an authority, or by `issuer`, its certificate and its key."""
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    is_authority = issuer is None
    made = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(issuer[0].subject if issuer else own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1 + is_authority))
        .not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_authority,
                key_cert_sign=is_authority,
                crl_sign=is_authority,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
    return made


def model_signing(*arguments: str | Path) -> tuple[int, str]:
    """What model-signing's command line says: its exit code, and the text."""
    from model_signing._cli import main

    done = CliRunner().invoke(main, list(map(str, arguments)))
    return done.exit_code, done.output


def statement_of(bundle: Path) -> dict[str, Any]:
    """The statement in a bundle."""
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(bundle.read_text())["dsseEnvelope"]["payload"]))
    return found
