"""Rows that are hard to quantise, in a way each, and importance that is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Array = np.ndarray


def hard_rows(random: np.random.Generator, rows: int, columns: int) -> Iterator[Array]:
    """Float32 arrays of so many rows, of all kinds one after the other."""
    shape, groups = (rows, columns), (rows, columns // 16)
    normal, ulps = random.standard_normal(shape), random.integers(-3, 4, shape) * 2.0**-23
    bits = np.frombuffer(random.bytes(4 * rows * columns), np.float32).reshape(shape)

    def each(group: Array) -> Array:
        return np.repeat(group, 16, axis=1)

    with np.errstate(all="ignore"):
        found = [
            normal,
            random.standard_t(1.5, shape),
            normal * 10.0 ** random.uniform(-44, 3, (rows, 1)),  # down to subnormals
            normal * 10.0 ** random.uniform(-20, 3, shape),
            normal * 10.0 ** random.uniform(-18, -12, (rows, 1)),  # around what counts as zero
            normal * each(10.0 ** random.uniform(-30, 2, groups)),
            1 + ulps,
            -1 - ulps,
            np.where(random.random(shape) < 0.05, normal, -1 + ulps),
            np.abs(normal),
            -np.abs(normal),
            normal * (random.random(shape) < 0.03),
            np.maximum(normal, 0),
            random.integers(-4, 5, shape),
            random.integers(-9, 10, shape) / 2,
            each(random.standard_normal(groups)),
            random.choice([0.0, -0.0], shape),
            np.where(each(random.random(groups) < 0.5), random.choice([0.0, -0.0], shape), normal),
            np.where(random.random(shape) < 0.01, 10.0 ** random.uniform(0, 4, shape), normal / 1000),
            np.where(np.abs(bits) < 1e4, bits, 0),
        ]
        yield from (np.ascontiguousarray(values, np.float32) for values in found)


def hard_importance(random: np.random.Generator, columns: int) -> Iterator[Array | None]:
    """None, and float32 vectors of all kinds one after the other."""
    some = random.random(columns)
    found = [
        random.standard_normal(columns) ** 2,
        np.where(random.random(columns) < 0.3, 0, some * 10.0 ** random.uniform(-20, 5, columns)),
        np.zeros(columns),
        np.where(np.repeat(random.random(columns // 16) < 0.5, 16), 0, some),
    ]
    yield None
    yield from (values.astype(np.float32) for values in found)
