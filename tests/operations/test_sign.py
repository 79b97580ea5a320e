"""What is signed here, model-signing's own command line verifies; and what cannot be signed is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from signing_keys import model_signing, save_certificate, save_key, statement_of
from support import write_checkpoint
from systems import mkfifo

import weightops
from weightops.errors import (
    AuthenticationFailed,
    CorruptInput,
    Differs,
    NetworkFailed,
    OutputExists,
    SourceMissing,
    UsageError,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with a manifest, files that a hub and git put beside it, and keys in the folder above."""
    folder = tmp_path / "model"
    write_checkpoint(folder, {"a": torch.ones(4)})
    (folder / "sub").mkdir()
    (folder / "sub/.notes").write_text("notes")
    (folder / "weightops-manifest.json").write_bytes(weightops.manifest(folder).to_bytes())
    (folder / ".gitattributes").write_text("* lfs")
    save_key(tmp_path, "signer")
    return folder


def verified(model: Path, *options: str | Path) -> str:
    code, said = model_signing("verify", "key", model, "--signature", model / "model.sig", *options)
    return said if code else ""


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_model_signing_verifies_what_we_sign(model: Path, curve: ec.EllipticCurve) -> None:
    save_key(model.parent, "signer", curve)
    made = weightops.sign(model, key=model.parent / "signer.key")
    public = ("--public_key", model.parent / "signer.pub")
    assert verified(model, *public) == ""
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert {*made.files} == names - {"model.sig", ".gitattributes"} >= {"weightops-manifest.json", "sub/.notes"}
    assert made.nbytes == sum((model / name).stat().st_size for name in made.files)
    (model / "sub/.notes").write_text("Notes")
    assert "Hash mismatch for" in verified(model, *public)


def test_the_program_itself_verifies_it_too(model: Path) -> None:
    weightops.sign(model, key=model.parent / "signer.key")
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(model)]
    command += ["--signature", str(model / "model.sig"), "--public_key", str(model.parent / "signer.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr


def test_the_statement_is_the_one_that_model_signing_makes(model: Path) -> None:
    weightops.sign(model, key=model.parent / "signer.key")
    ours = statement_of(model / "model.sig")
    model_signing(
        "sign", "key", model, "--signature", model / "model.sig", "--private_key", model.parent / "signer.key"
    )
    theirs = statement_of(model / "model.sig")
    for each in (ours, theirs):
        each["predicate"]["serialization"]["ignore_paths"].sort()
    assert ours == theirs


def test_a_certificate_and_the_chain_to_a_trusted_one(model: Path, tmp_path: Path) -> None:
    key = save_key(tmp_path, "root")
    root = save_certificate(tmp_path, "root", key)
    save_certificate(tmp_path, "leaf", save_key(tmp_path, "leaf"), (root, key))
    made = weightops.sign(
        model, key=tmp_path / "leaf.key", certificate=tmp_path / "leaf.pem", chain=tmp_path / "root.pem"
    )
    assert made.signer == "certificate CN=leaf"
    code, said = model_signing(
        *("verify", "certificate", model, "--signature", model / "model.sig"),
        *("--certificate_chain", tmp_path / "root.pem"),
    )
    assert code == 0, said
    assert weightops.verify(model, signature=model / "model.sig", certificate=tmp_path / "root.pem").verdict
    with pytest.raises(UsageError, match=r"leaf.pem: is not the certificate of .*signer.key"):
        weightops.sign(model, key=tmp_path / "signer.key", certificate=tmp_path / "leaf.pem", overwrite=True)
    with pytest.raises(CorruptInput, match=r"signer.pub: is no certificate in PEM"):
        weightops.sign(model, key=tmp_path / "signer.key", certificate=tmp_path / "signer.pub", overwrite=True)


def test_a_key_with_a_password(model: Path, tmp_path: Path) -> None:
    save_key(tmp_path, "locked", password=b"secret")
    (tmp_path / "password").write_bytes(b"secret\r\nmore\n")
    (tmp_path / "wrong").write_bytes(b"Secret\n")
    with pytest.raises(UsageError, match=r"locked.key: is locked with a password"):
        weightops.sign(model, key=tmp_path / "locked.key")
    with pytest.raises(AuthenticationFailed, match="is no private key, or has another password"):
        weightops.sign(model, key=tmp_path / "locked.key", password_file=tmp_path / "wrong")
    with pytest.raises(UsageError, match=r"signer.key: has no password"):
        weightops.sign(model, key=tmp_path / "signer.key", password_file=tmp_path / "wrong")
    assert not (model / "model.sig").exists()
    weightops.sign(model, key=tmp_path / "locked.key", password_file=tmp_path / "password")
    assert verified(model, "--public_key", tmp_path / "locked.pub") == ""


def test_a_single_file_is_signed_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"weights")
    save_key(tmp_path, "signer")
    made = weightops.sign(file, key=tmp_path / "signer.key")
    assert made.signature == str(tmp_path / "x.gguf.sig")
    public = ("--public_key", tmp_path / "signer.pub")
    assert model_signing("verify", "key", file, "--signature", made.signature, *public)[0] == 0
    assert weightops.verify(file, signature=made.signature, key=tmp_path / "signer.pub").verdict


def test_a_signature_may_lie_elsewhere_and_have_any_name(model: Path, tmp_path: Path) -> None:
    public = ("--public_key", tmp_path / "signer.pub")
    for out in (tmp_path / "apart.sig", model / "sub" / "mine.json"):
        weightops.sign(model, key=tmp_path / "signer.key", out=out)
        code, said = model_signing("verify", "key", model, "--signature", out, *public)
        assert code == 0, said
        assert weightops.verify(model, signature=out, key=tmp_path / "signer.pub").verdict


def test_links_are_signed_only_on_demand(model: Path, tmp_path: Path) -> None:
    (model / "sub/.notes").rename(model / "notes")
    (model / "sub/.notes").symlink_to("../notes")
    with pytest.raises(CorruptInput, match=r"'sub/.notes' is a link"):
        weightops.sign(model, key=tmp_path / "signer.key")
    weightops.sign(model, key=tmp_path / "signer.key", allow_symlinks=True)
    public = ("--public_key", tmp_path / "signer.pub")
    assert verified(model, *public, "--allow_symlinks") == ""
    assert "because it is a symlink" in verified(model, *public)
    assert weightops.verify(model, signature=model / "model.sig", key=tmp_path / "signer.pub").verdict
    (model / "more").symlink_to("sub")
    with pytest.raises(CorruptInput, match="'more' is a link to a folder, and cannot be signed"):
        weightops.sign(model, key=tmp_path / "signer.key", allow_symlinks=True, overwrite=True)


def test_what_is_not_as_its_manifest_says_is_not_signed(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" ")
    with pytest.raises(Differs, match=r"config.json is not what the manifest of .*model lists, and is not signed"):
        weightops.sign(model, key=tmp_path / "signer.key")
    (model / "config.json").unlink()
    with pytest.raises(Differs, match=r"weightops-manifest.json lists config.json, which is not there"):
        weightops.sign(model, key=tmp_path / "signer.key")
    assert not (model / "model.sig").exists()
    (model / "mine.sig").touch()
    (model / "weightops-manifest.json").write_bytes(weightops.manifest(model).to_bytes())
    with pytest.raises(Differs, match=r"weightops-manifest.json lists the signature, which lists it in turn"):
        weightops.sign(model, key=tmp_path / "signer.key", out=model / "mine.sig", overwrite=True)
    (model / "weightops-manifest.json").unlink()
    made = weightops.sign(model, key=tmp_path / "signer.key")
    assert made.warnings == ("there is no weightops-manifest.json: how the model was made is not signed with it",)


def test_a_signature_is_no_file_of_the_model(model: Path, tmp_path: Path) -> None:
    """A manifest does not list it, which it lists in turn, nor is it extra."""
    weightops.sign(model, key=tmp_path / "signer.key")
    assert "model.sig" not in weightops.manifest(model).files
    assert weightops.verify(model, extra="fail").verdict


def test_what_can_be_known_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    weightops.sign(model, key=tmp_path / "signer.key", dry_run=True)
    assert not (model / "model.sig").exists()
    weightops.sign(model, key=tmp_path / "signer.key")
    before = (model / "model.sig").read_bytes()
    with pytest.raises(OutputExists, match=r"model.sig exists"):
        weightops.sign(model, key=tmp_path / "signer.key")
    assert (model / "model.sig").read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceMissing, match="empty: holds no files to sign"):
        weightops.sign(tmp_path / "empty", key=tmp_path / "signer.key")
    with pytest.raises(SourceMissing, match="none: no such folder or file"):
        weightops.sign(tmp_path / "none", key=tmp_path / "signer.key")
    with pytest.raises(UsageError, match="the private key lies among the files to sign"):
        weightops.sign(tmp_path, key=tmp_path / "signer.key")
    mkfifo(model / "pipe")
    with pytest.raises(CorruptInput, match="'pipe' is neither a file nor a folder"):
        weightops.sign(model, key=tmp_path / "signer.key", overwrite=True)
    (model / "pipe").unlink()
    (model / "two\nlines").touch()
    with pytest.raises(CorruptInput, match="is not a plain path inside the folder"):
        weightops.sign(model, key=tmp_path / "signer.key", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "signed with a key, or with an identity"),
        ({"key": "x", "sigstore": True}, "signed with a key, or with an identity"),
        ({"sigstore": True, "certificate": "x"}, "Sigstore makes its own key and certificate"),
        ({"key": "x", "trust_config": "x"}, "tokens and trust configurations are Sigstore's"),
        ({"key": "x", "chain": "x"}, "a chain leads to a certificate, and there is none"),
        ({"key": "x", "certificate": "x", "password_file": __file__}, "takes no password where there is a certificate"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weightops.sign(model, **options)


def test_sigstore_is_asked_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("weightops.operations.sign.operation.hash_files", pytest.fail)
    with pytest.raises(NetworkFailed, match="Sigstore could not be asked"):
        weightops.sign(model, sigstore=True)


def test_without_the_packages_the_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UsageError, match="need the packages model-signing and pyOpenSSL") as caught:
        weightops.sign(model, key=model.parent / "signer.key")
    assert caught.value.hint == "pip install 'weightops[sign]'"


def test_no_other_command_imports_them() -> None:
    code = "import sys; from weightops.cli.main import run; run(['inspect', '--help']); run(['verify', '--help']);"
    code += "import weightops.operations.verify, weightops.operations.sign;"
    code += "print([n for n in sys.modules if n.partition('.')[0] in ('model_signing', 'OpenSSL', 'sigstore')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
