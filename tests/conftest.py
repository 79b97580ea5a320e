"""Fixtures of several test modules."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

# Before torch: two processes with as many OpenMP threads as cores would wait for each other in loops.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores: more threads only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import systems
import torch
from hypothesis import settings

systems.install(os.environ.get(systems.VARIABLE, ""))  # no test has imported weightops yet
# A test that takes long beside others is not wrong. What is drawn at random is drawn anew in every run.
settings.register_profile("quick", deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.load_profile("thorough" if "slow or not slow" in sys.argv else "quick")


def pytest_collection_finish() -> None:
    """Whoever collects garbage from now on need not go through all modules and tests, which takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes in one thread: with more, MKL's AVX2 kernels give other bits for some shapes, peft's included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store_endpoint() -> Iterator[str]:
    """Where an object store is that keeps Amazon's rules; one for all tests, each with a bucket of its own.

    WEIGHTOPS_TEST_STORE names another than the one from the package index; it has to know the keys of `buckets`.
    """
    import buckets

    given = os.environ.get("WEIGHTOPS_TEST_STORE")
    if given is not None:
        yield given
        return
    with buckets.ministack() as endpoint:
        yield endpoint


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep in the user's cache folder is kept in one of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
