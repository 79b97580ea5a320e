"""The version of weightops, and those that results may depend on, found without importing anything heavy."""

from __future__ import annotations

__version__ = "0.1.0"

_LIBRARIES = ("numpy", "safetensors", "torch", "transformers", "xxhash")


def library_versions() -> dict[str, str]:
    """Versions of weightops, Python and the libraries that compute or define bytes."""
    # Imported here because starting takes longer than most of what commands do first.
    import platform
    from importlib import metadata

    versions = {"weightops": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
