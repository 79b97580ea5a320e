"""A folder held against a signature: theirs by ours, and everything that may be wrong with either."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from signing_keys import model_signing, save_certificate, save_key
from systems import mkfifo

import weightops
from weightops.errors import CorruptInput, Differs, NetworkFailed, SourceMissing, UsageError

GOLDEN = Path(__file__).parents[2] / "golden/model-signing"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder and keys beside it, signed by model-signing."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name, data in (("a.bin", b"a" * 25), ("sub/b.bin", b"b" * 10), (".hidden", b"h"), (".gitignore", b"g")):
        (folder / name).write_bytes(data)
    for name in ("signer", "other"):
        save_key(tmp_path, name)
    code, said = model_signing(
        "sign", "key", folder, "--signature", folder / "model.sig", "--private_key", tmp_path / "signer.key"
    )
    assert code == 0, said
    return folder


def verify(model: Path, **options: Any) -> weightops.api.prove.VerifyReport:
    given = {"signature": model / "model.sig", "key": model.parent / "signer.pub", **options}
    return weightops.verify(model, **given)


def test_what_model_signing_signs_is_verified(model: Path) -> None:
    report = verify(model)
    assert report.verdict
    assert {file.name: file.status for file in report.files} == dict.fromkeys((".hidden", "a.bin", "sub/b.bin"), "ok")
    assert report.signer is not None
    assert report.signer.startswith("key sha256:")
    assert report.nbytes == 36


@pytest.mark.parametrize("algorithm", ["sha256", "blake2", "blake3"])
@pytest.mark.parametrize("method", ["files", "shards"])
def test_every_list_that_model_signing_writes_is_verified(model: Path, algorithm: str, method: str) -> None:
    from model_signing import hashing, signing

    how = hashing.Config().set_ignored_paths(paths=["model.sig"])
    if method == "files":
        how.use_file_serialization(hashing_algorithm=algorithm)
    else:
        how.use_shard_serialization(hashing_algorithm=algorithm, shard_size=10)
    signer = signing.Config().use_elliptic_key_signer(private_key=model.parent / "signer.key")
    signer.set_hashing_config(how).sign(model, model / "model.sig")
    assert verify(model).verdict
    (model / "a.bin").write_bytes(b"a" * 14 + b"b" + b"a" * 10)
    changed = {file.name: file for file in verify(model).files}["a.bin"]
    assert changed.status == "differs"
    if method == "shards" and algorithm != "blake3":
        assert changed.expected.startswith("bytes 10 to 20: ")
    (model / "a.bin").write_bytes(b"a" * 26)
    assert not verify(model).verdict


def test_an_empty_file_is_no_part_of_a_list_of_ranges(model: Path) -> None:
    """model-signing makes no range of it, so that anybody could add one."""
    from model_signing import hashing, signing

    (model / "empty").touch()
    how = hashing.Config().use_shard_serialization(shard_size=10).set_ignored_paths(paths=["model.sig"])
    signer = signing.Config().use_elliptic_key_signer(private_key=model.parent / "signer.key")
    signer.set_hashing_config(how).sign(model, model / "model.sig")
    assert [file.name for file in verify(model).files if file.status != "ok"] == ["empty"]


def test_a_certificate_that_a_trusted_one_vouches_for_is_verified(model: Path, tmp_path: Path) -> None:
    key = save_key(tmp_path, "root")
    root = save_certificate(tmp_path, "root", key)
    save_certificate(tmp_path, "leaf", save_key(tmp_path, "leaf"), (root, key))
    save_certificate(tmp_path, "stranger", save_key(tmp_path, "stranger"))
    code, said = model_signing(
        *("sign", "certificate", model, "--signature", model / "model.sig", "--private_key", tmp_path / "leaf.key"),
        *("--signing_certificate", tmp_path / "leaf.pem", "--certificate_chain", tmp_path / "root.pem"),
    )
    assert code == 0, said
    report = verify(model, key=None, certificate=tmp_path / "root.pem")
    assert report.verdict
    assert report.signer == "certificate CN=leaf"
    assert verify(model, key=None, certificate=[tmp_path / "stranger.pem", tmp_path / "root.pem"]).verdict
    with pytest.raises(
        Differs, match=r"is not signed by somebody for whom certificate CN=stranger vouches: .*certific"
    ):
        verify(model, key=None, certificate=tmp_path / "stranger.pem")
    with pytest.raises(Differs, match="is signed with a certificate, not with a key") as caught:
        verify(model)
    assert caught.value.hint == "if that is whom you trust, give --certificate FILE"
    document = json.loads((model / "model.sig").read_text())
    chain = document["verificationMaterial"]["x509CertificateChain"]["certificates"]
    chain[0]["rawBytes"] = chain[0]["rawBytes"][:100]
    (model / "model.sig").write_text(json.dumps(document))
    with pytest.raises(CorruptInput, match="a certificate in it is cut off or damaged"):
        verify(model, key=None, certificate=tmp_path / "root.pem")


@pytest.mark.parametrize(
    ("name", "options"),
    [("v0.2.0-certificate", {"certificate": GOLDEN / "ca-cert.pem"}), ("v1.0.0-key/one", {"key": GOLDEN / "key.pub"})],
)
def test_bundles_of_earlier_versions_are_verified(tmp_path: Path, name: str, options: dict[str, Path]) -> None:
    """As the authors of model-signing have published them: see the README there."""
    folder = shutil.copytree(GOLDEN / name.partition("/")[0], tmp_path / "old")
    subject = folder / name.partition("/")[2]
    assert weightops.verify(subject, signature=folder / "model.sig", **options).verdict
    next(path for path in sorted(folder.iterdir()) if path.name != "model.sig").write_bytes(b"other")
    assert not weightops.verify(subject, signature=folder / "model.sig", **options).verdict


def of_another_folder(model: Path) -> None:
    other = model.parent / "another"
    other.mkdir()
    (other / "c.bin").write_bytes(b"c")
    model_signing(
        *("sign", "key", other, "--signature", model / "model.sig", "--private_key", model.parent / "signer.key")
    )


TAMPERINGS: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "a changed file": (lambda m: (m / "a.bin").write_bytes(b"A" + b"a" * 24), {"a.bin": "differs"}),
    "a shorter file": (lambda m: (m / "a.bin").write_bytes(b"a"), {"a.bin": "differs"}),
    "a file that is gone": (lambda m: (m / "sub/b.bin").unlink(), {"sub/b.bin": "missing"}),
    "a file more": (lambda m: (m / "sub/c.bin").touch(), {"sub/c.bin": "extra"}),
    "a hidden file more": (lambda m: (m / "sub/.c").touch(), {"sub/.c": "extra"}),
    "a file for git further down": (lambda m: (m / "sub/.gitignore").touch(), {"sub/.gitignore": "extra"}),
    "a file called like the bundle": (lambda m: (m / "sub/model.sig").touch(), {"sub/model.sig": "extra"}),
    "another name": (
        lambda m: (m / "a.bin").rename(m / "c.bin"),
        {"a.bin": "missing", "c.bin": "extra"},
    ),
    "two files that have changed places": (
        lambda m: [(m / "a.bin").write_bytes(b"b" * 10), (m / "sub/b.bin").write_bytes(b"a" * 25)],
        {"a.bin": "differs", "sub/b.bin": "differs"},
    ),
    "a folder in the place of a file": (
        lambda m: [(m / "a.bin").unlink(), (m / "a.bin").mkdir()],
        {"a.bin": "unreadable"},
    ),
    "a link that leaves the folder": (
        lambda m: [(m / "a.bin").rename(m.parent / "a.bin"), (m / "a.bin").symlink_to(m.parent / "a.bin")],
        {"a.bin": "unreadable"},
    ),
    "a link to a folder": (lambda m: (m / "more").symlink_to("sub"), {"more": "unreadable"}),
    "a link more": (lambda m: (m / "more").symlink_to("a.bin"), {"more": "extra"}),
    "a pipe": (lambda m: mkfifo(m / "pipe"), {"pipe": "unreadable"}),
    "another folder's signature": (
        of_another_folder,
        {"c.bin": "missing", ".hidden": "extra", "a.bin": "extra", "sub/b.bin": "extra"},
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_told_by_name(model: Path, name: str) -> None:
    tamper, expected = TAMPERINGS[name]
    tamper(model)
    report = verify(model)
    assert not report.verdict
    assert {file.name: file.status for file in report.files if file.status != "ok"} == expected
    assert (name == "another folder's signature") == bool(report.problems)


@pytest.mark.parametrize("name", [".gitignore", ".gitattributes", ".git/config", ".github/x.yml", "model.sig"])
def test_only_the_bundle_and_what_is_for_git_may_be_there_too(model: Path, name: str) -> None:
    if name != "model.sig":
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("other")
    assert verify(model).verdict


def test_files_that_are_not_signed_may_be_let_pass(model: Path) -> None:
    (model / "notes.txt").touch()
    assert verify(model, extra="warn").verdict
    assert [file.name for file in verify(model, extra="warn").files if file.status == "extra"] == ["notes.txt"]
    assert [file for file in verify(model, extra="ignore").files if file.status == "extra"] == []


def test_files_that_the_signer_has_left_out_are_not_signed(model: Path) -> None:
    """Where model-signing lets them pass."""
    key = ("--private_key", model.parent / "signer.key")
    left_out = ("--ignore-paths", model / "sub")
    assert model_signing("sign", "key", model, "--signature", model / "model.sig", *key, *left_out)[0] == 0
    assert [file.name for file in verify(model).files if file.status == "extra"] == ["sub/b.bin"]


def test_links_in_the_folder_are_what_they_lead_to(model: Path) -> None:
    (model / "a.bin").rename(model / "sub/a.bin")
    (model / "a.bin").symlink_to("sub/a.bin")
    assert [file.name for file in verify(model).files if file.status != "ok"] == ["sub/a.bin"]


def test_a_bundle_may_lie_elsewhere_and_a_model_may_be_one_file(model: Path, tmp_path: Path) -> None:
    (model / "model.sig").rename(tmp_path / "apart.sig")
    assert verify(model, signature=tmp_path / "apart.sig").verdict
    key = ("--private_key", tmp_path / "signer.key")
    assert model_signing("sign", "key", model / "a.bin", "--signature", tmp_path / "a.sig", *key)[0] == 0
    assert verify(model / "a.bin", signature=tmp_path / "a.sig", key=tmp_path / "signer.pub").verdict
    with pytest.raises(Differs, match=r"is the signature of a single file, which .*model is not"):
        verify(model, signature=tmp_path / "a.sig")
    with pytest.raises(Differs, match=r"is the signature of a folder, which .*a.bin is not"):
        verify(model / "a.bin", signature=tmp_path / "apart.sig", key=tmp_path / "signer.pub")


def test_another_key_is_refused_with_or_without_a_hint_at_it(model: Path) -> None:
    with pytest.raises(Differs, match=r"model.sig: is not signed by key sha256:[0-9a-f]{64}: Key mismatch"):
        verify(model, key=model.parent / "other.pub")
    document = json.loads((model / "model.sig").read_text())
    document["verificationMaterial"]["publicKey"] = {}
    (model / "model.sig").write_text(json.dumps(document))
    assert verify(model).verdict
    with pytest.raises(Differs, match="its signature is that of other contents, or by another key"):
        verify(model, key=model.parent / "other.pub")


def test_a_list_that_was_changed_after_signing_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sig"
    key = ("--private_key", tmp_path / "signer.key")
    (model / "a.bin").write_bytes(b"changed")
    assert (
        model_signing("sign", "key", model, "--signature", other, "--ignore-paths", model / "model.sig", *key)[0] == 0
    )
    mixed = json.loads((model / "model.sig").read_text())
    mixed["dsseEnvelope"]["payload"] = json.loads(other.read_text())["dsseEnvelope"]["payload"]
    (model / "model.sig").write_text(json.dumps(mixed))
    with pytest.raises(Differs, match="its signature is that of other contents"):
        verify(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": None}, "counts as that of one key, certificate or identity"),
        ({"certificate": "x.pem"}, "counts as that of one key, certificate or identity"),
        ({"key": None, "identity": "a@b.c"}, "an identity counts only together with who says so"),
        ({"key": None, "issuer": "https://a.b"}, "counts as that of one"),
        ({"issuer": "https://a.b"}, "an identity counts only together"),
        ({"trust_config": "x.json"}, "only identities of Sigstore need a trust configuration"),
        ({"signature": None}, "key says whose signature counts, and there is none"),
        ({"manifest": "list.md5"}, "manifest has no use with a signature"),
        ({"quick": True}, "quick has no use with a signature"),
        ({"content": True}, "content has no use with a signature"),
        ({"algorithm": "md5"}, "algorithm has no use with a signature"),
        ({"extra": "perhaps"}, "unknown policy 'perhaps'"),
    ],
)
def test_what_says_too_little_or_too_much_is_no_verdict(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verify(model, **options)


def test_keys_that_are_none_are_refused(model: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    save_key(tmp_path, "odd", ec.SECP256K1())
    large = rsa.generate_private_key(65537, 2048).public_key()
    (tmp_path / "rsa.pub").write_bytes(large.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for name, message in (
        ("model/a.bin", "is no public key of the elliptic curves P-256"),
        ("odd.pub", "is one of the curve secp256k1"),
        ("rsa.pub", "is a key of another kind"),
        ("signer.key", "is no public key"),
    ):
        with pytest.raises(CorruptInput, match=message) as caught:
            verify(model, key=tmp_path / name)
        assert (caught.value.hint is not None) == (name == "signer.key")
    with pytest.raises(SourceMissing, match=r"none.pub: no such file"):
        verify(model, key=tmp_path / "none.pub")
    with pytest.raises(CorruptInput, match="is no certificate in PEM"):
        verify(model, key=None, certificate=tmp_path / "signer.pub")
    with pytest.raises(SourceMissing, match=r"none.sig: no such file"):
        verify(model, signature=tmp_path / "none.sig")
    with pytest.raises(SourceMissing, match="none: no such folder or file"):
        weightops.verify(tmp_path / "none", signature=model / "model.sig", key=tmp_path / "signer.pub")


def test_sigstore_is_asked_before_anything_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(NetworkFailed, match="Sigstore could not be asked"):
        verify(model, key=None, identity="a@example.org", issuer="https://example.org")
    (tmp_path / "trust.json").write_text("{}")
    with pytest.raises(CorruptInput, match=r"trust.json: is no trust configuration of Sigstore"):
        verify(model, key=None, identity="a@b.c", issuer="https://b.c", trust_config=tmp_path / "trust.json")


@pytest.mark.skipif(os.name == "nt", reason="names in bytes")
def test_a_name_that_is_no_text_is_shown(model: Path) -> None:
    (model / os.fsdecode(b"\xff")).touch()
    assert [file.name for file in verify(model).files if file.status == "extra"] == ["\\xff"]
