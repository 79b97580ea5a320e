"""The Hugging Face cache as the environment describes it."""

from __future__ import annotations

import os
from pathlib import Path


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks that no server be asked."""
    return is_set("HF_HUB_OFFLINE")


def is_set(name: str) -> bool:
    """Whether a variable says yes, in one of the ways that huggingface_hub knows."""
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def hub_cache() -> Path:
    """The folder of cached repositories: HF_HUB_CACHE, `hub` in HF_HOME, or ~/.cache/huggingface/hub.

    As huggingface_hub's `constants` have it, older names included.
    """
    user = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    home = _expanded(os.environ.get("HF_HOME", os.path.join(user, "huggingface")))
    older = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return Path(_expanded(os.environ.get("HF_HUB_CACHE", older))).absolute()


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))
