"""The machine, the versions and the hub that commands work with, as `env` shows them; found without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import msgspec

from weightops.cli.hub_cache import is_offline
from weightops.cli.network import hub_endpoint, token_is_set
from weightops.io.platform.machine import available_memory, cores, file_system_type, total_memory
from weightops.stores.web.urls import show
from weightops.version import __version__

_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "triton",
    "kernels",
    "xxhash",
)
_COUNTING_S = 0.5
"""How long the files of a cache are counted."""
_ASKING_S = 5.0


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """The folder in which huggingface_hub keeps what it downloads; `nbytes` is None if it takes long to count."""

    path: str
    exists: bool
    nbytes: int | None


class Hub(msgspec.Struct, frozen=True, kw_only=True):
    """The hub that repositories are asked of. A token is never shown, only whether there is one."""

    endpoint: str
    is_offline: bool
    has_token: bool
    cache: Cache


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU, and its memory in bytes, None where that is not told (as of parts of a GPU)."""

    name: str
    nbytes: int | None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of memory: all of it, and what this process may still take."""

    total_nbytes: int | None
    available_nbytes: int


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """The file system of the current folder; `kind` is such as ext4, None where the system does not say."""

    folder: str
    kind: str | None
    total_nbytes: int
    free_nbytes: int


class EnvDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-env/2"):
    """What `env --json` prints. Versions of what is not installed are null; so are `gpus` where nobody could be asked.

    `gpus_by` says who was asked: nvidia-smi, or with --gpu torch.
    """

    versions: dict[str, str | None]
    system: str
    cores: int
    memory: Memory
    disk: Disk
    hub: Hub
    gpus: tuple[Gpu, ...] | None
    gpus_by: str | None


def describe(*, ask_torch: bool = False) -> EnvDocument:
    """Everything; `ask_torch` for GPUs, which imports it."""
    gpus_by = "torch" if ask_torch else "nvidia-smi"
    gpus = _gpus_of_torch() if ask_torch else _gpus_of_nvidia()
    return EnvDocument(
        versions=versions(),
        system=platform.platform(),
        cores=cores(),
        memory=Memory(total_nbytes=total_memory(), available_nbytes=available_memory()),
        disk=_disk(Path.cwd()),
        hub=_hub(),
        gpus=gpus,
        gpus_by=gpus_by if gpus is not None else None,
    )


def versions() -> dict[str, str | None]:
    """Versions of weightops, Python, and the libraries that a result may depend on."""
    return {"weightops": __version__, "python": platform.python_version(), **{n: _version(n) for n in _LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _disk(folder: Path) -> Disk:
    usage = shutil.disk_usage(folder)
    kind = file_system_type(folder)
    return Disk(folder=str(folder), kind=kind, total_nbytes=usage.total, free_nbytes=usage.free)


def _hub() -> Hub:
    return Hub(endpoint=show(hub_endpoint()), is_offline=is_offline(), has_token=token_is_set(), cache=_cache())


def _cache() -> Cache:
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE)
    exists = path.is_dir()
    return Cache(path=str(path), exists=exists, nbytes=count_cache(path) if exists else 0)


def count_cache(path: Path, limit_s: float = _COUNTING_S) -> int | None:
    """Bytes of what huggingface_hub keeps: of `models--org--name/blobs/*`, to which all other files are links."""
    nbytes, until_s = 0, time.monotonic() + limit_s
    for repository in _entries(path):
        for blob in _entries(Path(repository) / "blobs"):
            try:
                nbytes += blob.stat(follow_symlinks=False).st_size
            except OSError:
                continue
            if time.monotonic() > until_s:
                return None
    return nbytes


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def _gpus_of_nvidia() -> tuple[Gpu, ...] | None:
    """What nvidia-smi lists; None if there is no such program, or it does not answer."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASKING_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if line.strip()]
    return tuple(
        Gpu(name=name.strip(), nbytes=int(size) << 20 if size.strip().isdigit() else None) for name, _, size in rows
    )


def _gpus_of_torch() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(Gpu(name=each.name, nbytes=each.total_memory) for each in found)
