"""Who signs and who has signed: keys, certificates and Sigstore identities, which model-signing works with.

It is given lists of digests that are made here, because it reads files in a way of its own. When it verifies a bundle,
it holds what it finds signed against what `bundle` has read there, so that nothing counts that only one of them sees.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from weightops.errors import (
    AuthenticationFailed,
    CorruptInput,
    Differs,
    NetworkFailed,
    UsageError,
    WeightopsError,
)
from weightops.formats.proofs.bundle import Bundle, Kind, read_bundle
from weightops.formats.proofs.keys import (
    certificate_of,
    certificates,
    fingerprint,
    identity_of,
    name_of,
    private_key,
    public_key,
)
from weightops.io.escape import escape
from weightops.stores.local import read_source

if TYPE_CHECKING:
    from model_signing.hashing import Config
    from model_signing.manifest import Manifest
    from model_signing.signing import Config as SigningConfig
    from model_signing.verifying import Config as VerifyingConfig

_WITH: Mapping[Kind, str] = {
    "key": "a key",
    "certificate": "a certificate",
    "identity": "an identity of Sigstore",
}
_OPTIONS: Mapping[Kind, str] = {
    "key": "--key FILE",
    "certificate": "--certificate FILE",
    "identity": "--identity NAME --issuer URL",
}


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose signature counts: that of a public key, of a certificate that others vouch for, or of an identity.

    `certificate` are files with the certificates that are trusted, in PEM. `identity` is what Sigstore knows somebody
    by, such as an address, and `issuer` the URL of who says so; `trust_config` is for a Sigstore other than the public
    one. Raises `UsageError` unless it is exactly one of the three.
    """

    key: Path | None = None
    certificate: tuple[Path, ...] = ()
    identity: str | None = None
    issuer: str | None = None
    trust_config: Path | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.key, self.certificate, self.identity))) != 1:
            raise UsageError(
                "a signature counts as that of one key, certificate or identity",
                hint=f"give one of {', '.join(_OPTIONS.values())}",
            )
        if bool(self.identity) != bool(self.issuer):
            raise UsageError("an identity counts only together with who says so", hint=f"give {_OPTIONS['identity']}")
        if self.trust_config is not None and not self.identity:
            raise UsageError("only identities of Sigstore need a trust configuration", hint="leave it out")

    @property
    def kind(self) -> Kind:
        return "key" if self.key else "certificate" if self.certificate else "identity"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What to sign with: a private key, perhaps with a certificate for it, or an identity of Sigstore.

    `password` unlocks the key, `chain` are files with the certificates between `certificate` and one that others
    trust. `identity_token` is of OpenID Connect; without one Sigstore asks the machine that this runs on, and then a
    browser. Raises `UsageError` unless it is either a key or Sigstore.
    """

    key: Path | None = None
    password: bytes | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    sigstore: bool = False
    identity_token: str | None = None
    trust_config: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.key) == self.sigstore:
            raise UsageError(
                "a model is signed with a key, or with an identity of Sigstore", hint="give one of the two"
            )
        if self.sigstore and (self.password or self.certificate or self.chain):
            raise UsageError("Sigstore makes its own key and certificate", hint="leave those out, or --sigstore")
        if not self.sigstore and (self.identity_token or self.trust_config):
            raise UsageError("tokens and trust configurations are Sigstore's", hint="leave them out, or the key")
        if self.chain and self.certificate is None:
            raise UsageError("a chain leads to a certificate, and there is none", hint="give --certificate FILE")
        if self.certificate is not None and self.password is not None:
            raise UsageError(
                "model-signing takes no password where there is a certificate",
                hint="write the key without one where nobody else reads it: openssl pkey -in KEY -out PLAIN",
            )


class Verifier:
    """Checks that a bundle is signed by somebody. What it needs of keys and of the network is read at once.

    Raises `UsageError` without the package, `SourceMissing` and `CorruptInput` for keys and certificates that are not
    there or are none, `NetworkFailed` where Sigstore cannot be asked.
    """

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._config: VerifyingConfig = _library().verifying.Config()
        with _quietly():
            if trust.key is not None:
                self.who = f"key {fingerprint(public_key(trust.key))}"
                self._config.use_elliptic_key_verifier(public_key=trust.key)
            elif trust.certificate:
                trusted = [name_of(each) for path in trust.certificate for each in certificates(path)]
                self.who = f"somebody for whom {' or '.join(trusted[:3])} vouches"
                self._config.use_certificate_verifier(certificate_chain=trust.certificate)
            else:
                assert trust.identity is not None
                assert trust.issuer is not None
                self.who = f"identity {escape(trust.identity)} of {escape(trust.issuer)}"
                _asking_sigstore(
                    lambda: self._config.use_sigstore_verifier(
                        identity=cast(str, trust.identity),
                        oidc_issuer=cast(str, trust.issuer),
                        trust_config=trust.trust_config,
                    ),
                    trust.trust_config,
                )

    def check(self, path: Path, bundle: Bundle) -> str:
        """Who has signed the bundle at `path`, which says what `bundle` does.

        Raises `Differs` if it is signed by nobody, or by somebody else than is trusted; `CorruptInput` for certificates
        that cannot be read.
        """
        from cryptography.exceptions import InvalidSignature

        shown = escape(str(path))
        if bundle.kind != self._trust.kind:
            raise Differs(
                f"{shown}: is signed with {_WITH[bundle.kind]}, not with {_WITH[self._trust.kind]}",
                hint=f"if that is whom you trust, give {_OPTIONS[bundle.kind]}",
            )
        brought = [certificate_of(data, shown) for data in bundle.certificates]
        try:
            with _quietly():
                self._config.set_hashing_config(_given(_manifest(bundle))).verify(path.parent, path)
        except InvalidSignature:
            why = "its signature is that of other contents, or by another key"
        except Exception as error:  # whatever it is, the bundle is not verified
            why = escape(" ".join(str(error).split())) or type(error).__name__
        else:
            return name_of(brought[0]) if bundle.kind == "certificate" else self.who
        raise Differs(f"{shown}: is not signed by {self.who}: {why}", hint="trust none of it until you know why")


class Signer:
    """Signs lists of digests; keys and certificates are read, and held against each other, at once.

    Raises as `Verifier` does.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._config: SigningConfig = _library().signing.Config()
        self.who = "an identity of Sigstore"
        with _quietly():
            if credentials.key is None:
                _asking_sigstore(
                    lambda: self._config.use_sigstore_signer(
                        use_ambient_credentials=True,
                        identity_token=credentials.identity_token,
                        trust_config=credentials.trust_config,
                    ),
                    credentials.trust_config,
                )
                return
            public = private_key(credentials.key, credentials.password).public_key()
            if credentials.certificate is None:
                self.who = f"key {fingerprint(public)}"
                password = cast(Any, credentials.password)  # which it says is text, and needs as bytes
                self._config.use_elliptic_key_signer(private_key=credentials.key, password=password)
                return
            certificate, *others = certificates(credentials.certificate)
            if others or certificate.public_key() != public:
                raise UsageError(
                    f"{escape(str(credentials.certificate))}: is not the certificate of {escape(str(credentials.key))}"
                )
            for path in credentials.chain:
                certificates(path)
            self.who = name_of(certificate)
            self._config.use_certificate_signer(
                private_key=credentials.key,
                signing_certificate=credentials.certificate,
                certificate_chain=credentials.chain,
            )

    def sign(self, name: str, files: Mapping[str, str], ignored: Sequence[str], allow_symlinks: bool) -> bytes:
        """The bundle that says that the model `name` has files with these SHA-256 digests, by name.

        `ignored` are files and folders that it leaves out. Raises `AuthenticationFailed`, `NetworkFailed` and
        `WeightopsError` for what Sigstore refuses.
        """
        serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": allow_symlinks}
        made = _made(name, files.items(), "sha256", {**serialization, "ignore_paths": [*ignored]})
        with TemporaryDirectory(prefix="weightops-") as folder:
            target = Path(folder) / "bundle"
            self._config.set_hashing_config(_given(made))
            with _quietly():
                if self._credentials.sigstore:
                    _asking_sigstore(lambda: self._config.sign(folder, target), None)
                else:
                    self._config.sign(folder, target)
            data = target.read_bytes()
        if self._credentials.sigstore:
            (certificate,) = read_bundle(data, "what Sigstore has signed").certificates
            self.who = identity_of(certificate_of(certificate, "what Sigstore has signed"))
        return data


class _Given:
    """Stands for the part of model-signing that reads a model: gives it a list that is made already."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def hash(self, model_path: object, *, files_to_hash: object = None) -> Manifest:
        return self._manifest

    def add_ignored_paths(self, *, model_path: object, paths: object) -> None:
        """What is left out has been left out."""


def _given(manifest: Manifest) -> Config:
    return cast("Config", _Given(manifest))


def _manifest(bundle: Bundle) -> Manifest:
    """What a bundle says, as model-signing has it."""
    hash_type = str(bundle.method["hash_type"])
    of_parts = bundle.method["method"] == "shards"
    algorithm = f"{hash_type}-sharded-{bundle.method['shard_size']}" if of_parts else hash_type
    items = [
        (f"{name}:{part.start}:{part.stop}" if of_parts else name, part.digest)
        for name, file in bundle.files.items()
        for part in file.parts
    ]
    return _made(bundle.name, items, algorithm, {"allow_symlinks": False, **bundle.method})


def _made(name: str, items: Collection[tuple[str, str]], algorithm: str, method: Mapping[str, Any]) -> Manifest:
    from model_signing._hashing.hashing import Digest
    from model_signing.manifest import Manifest, SerializationType

    kind = SerializationType.from_args(dict(method))
    return Manifest(name, [kind.new_item(n, Digest(algorithm, bytes.fromhex(d))) for n, d in items], kind)


def _library() -> Any:
    try:
        import model_signing
        import OpenSSL  # noqa: F401  # which model-signing imports without asking for it
    except ImportError:
        raise UsageError(
            "signatures need the packages model-signing and pyOpenSSL, which are not installed",
            hint="pip install 'weightops[sign]'",
        ) from None
    return model_signing


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep model-signing from stdout, which may have to be one JSON document, and from warning its own authors."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _asking_sigstore(call: Callable[[], object], config: Path | None) -> None:
    """Do what may ask Sigstore's servers, with their failures as ours."""
    if config is not None:
        read_source(config)
    try:
        call()
    except WeightopsError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {escape(' '.join(str(error).split()))}".removesuffix(": ")
        if config is not None and isinstance(error, ValueError | KeyError):
            raise CorruptInput(f"{escape(str(config))}: is no trust configuration of Sigstore ({why})") from None
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"NetworkError", "TUFError", "ConnectionError", "DownloadError", "Timeout", "RequestException"}:
            raise NetworkFailed(f"Sigstore could not be asked ({why})", hint="is there a network?") from None
        if names & {"IdentityError", "ExpiredIdentity", "ExpiredCertificate"}:
            raise AuthenticationFailed(f"Sigstore takes no such identity ({why})") from None
        raise WeightopsError(f"Sigstore has failed ({why})") from None
