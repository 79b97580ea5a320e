"""Small models with tokenizers, and text to calibrate them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_models.text(400))
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of some kind, made when it is first asked for."""
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_models.save_tiny(made[kind], kind)
        return made[kind]

    return find
