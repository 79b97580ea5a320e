"""Fixtures of the tests of operations."""

from __future__ import annotations

import pytest
from adapters import Made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Small models and adapters, each made when it is first asked for."""
    return Made(tmp_path_factory.mktemp("made"))
