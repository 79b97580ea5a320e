"""The version of weightops, and those that results may depend on, found without importing anything heavy."""

from __future__ import annotations

from functools import cache

__version__ = "0.1.0"

_LIBRARIES = ("numpy", "safetensors", "torch", "transformers", "xxhash")


def library_versions() -> dict[str, str]:
    """Versions of weightops, Python and the libraries that compute or define bytes."""
    import platform  # here because starting takes longer than most of what commands do first

    found = {name: _installed(name) for name in _LIBRARIES}
    versions = {"weightops": __version__, "python": platform.python_version()}
    return versions | {name: version for name, version in found.items() if version is not None}


@cache
def _installed(name: str) -> str | None:
    """The version of a library, for which its metadata is searched and parsed: milliseconds each time."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
