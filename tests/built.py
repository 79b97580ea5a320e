"""Wheels and sdists, built by hatchling without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(kind: str, folder: Path, tree: Path = ROOT) -> Path:
    """The wheel or sdist, made of a tree as it stands."""
    pytest.importorskip("hatchling", reason="set-up installs hatchling: this environment is of before it did")
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built
