"""Encoders of ggml's K types, blocks of 256 elements: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K.

A block has a float16 scale, in most types a second one for minima, and for each 16 or 32 of its elements a scale (and
a minimum) of a few bits. First each group's scale is searched for by itself; then those are rounded; then every element
is coded again by what they have become. A group whose scale has become zero keeps the codes of the search, which
nothing reads; so does ggml. Sources: `quantize_row_*_K_ref` without importance and `quantize_row_*_K_impl` with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.ops.ggml import packing
from weightops.ops.ggml.packing import as_bytes, by_block, halves, lanes
from weightops.ops.ggml.search import (
    TINIEST,
    extreme,
    fit_by_turns,
    fit_positive,
    fit_symmetric,
    fit_with_minimum,
    nearest,
    total,
)
from weightops.ops.ggml.small_blocks import weighed
from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from weightops.ops.ggml.search import Codes
    from weightops.ops.ggml.space import Bytes, Floats, Space

_SIZE = 256
_TRIES = (-0.9, 0.05, 36)


def q2_k(x: Floats, importance: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """16 groups of 16: scales and minima of 4 bits, codes from 0 to 3."""
    import numpy as np

    groups = lanes(x, 16, "x", space)
    if importance is None:
        weights = np.abs(groups, out=space.floats("weights", *groups.shape))
        scales, minima, codes = fit_with_minimum(groups, weights, 3, (-0.5, 0.1, 15), space, absolute=True)
        factor, of_scales = _against_largest(_of_blocks(scales, 16), 15)
        minimum, of_minima = _against_largest(_of_blocks(-minima, 16), 15)
    else:
        weights = weighed(groups, importance, _mean_squares(x, 16, 1, space), space)
        scales, minima, codes = fit_with_minimum(groups, weights, 3, _TRIES, space)
        sums = _of_blocks(total(weights), 16)
        factor, of_scales = fit_positive(_of_blocks(scales, 16), sums, 15)
        minimum, of_minima = fit_positive(_of_blocks(-minima, 16), sums, 15)
    both = np.stack([halves(factor, DType.Q2_K), halves(minimum, DType.Q2_K)], axis=1)
    packed = of_scales | of_minima << 4
    d = _times(both[:, 0], packed & 15)
    recoded = _recoded(groups, d, 0, 3, codes, space, _times(both[:, 1], packed >> 4))
    out[:, :16] = packed.T
    out[:, 16:80] = packing.pairs(by_block(recoded, _SIZE))
    out[:, 80:] = as_bytes(both)


def q3_k(x: Floats, importance: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """16 groups of 16: scales of 6 bits, codes from 0 to 7 that stand for -4 to 3."""
    import numpy as np

    groups = lanes(x, 16, "x", space)
    if importance is None:
        scales, found = fit_by_turns(groups, 4)
        by_group = _of_blocks(scales, 16)
        largest = extreme(by_group)
        factors = np.float32(-32) / largest
        rounded = np.clip(nearest(factors * by_group).astype(np.int8), -32, 31) + np.int8(32)
        of_scales = np.where(largest != 0, rounded, 0).astype(np.uint8)
        factor = np.where(largest != 0, np.float32(1) / factors, np.float32(0))

        def of_turns(some: Any) -> NDArray[np.uint8]:
            return found[:, some].astype(np.uint8)

        codes: Codes = of_turns
    else:
        weights = weighed(groups, importance, _mean_squares(x, 16, 2, space), space)
        sums = _of_blocks(total(weights), 16)
        scales, codes = fit_symmetric(groups, weights, 4, space)
        factor, best = fit_symmetric(_of_blocks(scales, 16), sums, 32, space)
        of_scales = best(slice(None))
    half = halves(factor, DType.Q3_K)
    d = _times(half, of_scales.astype(np.int8) - np.int8(32))
    recoded = by_block(_recoded(groups, d, -4, 3, codes, space), _SIZE)
    out[:, :32] = packing.single_bits(recoded >> 2)
    out[:, 32:96] = packing.pairs(recoded)
    out[:, 96:108] = packing.six_bit_scales(np.ascontiguousarray(of_scales.T))
    out[:, 108:] = as_bytes(half)


def q4_k(x: Floats, importance: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """8 groups of 32: scales and minima of 6 bits, codes from 0 to 15."""
    scales, codes = _four_or_five(x, importance, 15, (-1.0, 0.1, 20), DType.Q4_K, space)
    out[:, :16], out[:, 16:] = scales, packing.nibbles(codes, 32)


def q5_k(x: Floats, importance: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """8 groups of 32: scales and minima of 6 bits, codes from 0 to 31."""
    scales, codes = _four_or_five(x, importance, 31, (-0.5, 0.1, 15), DType.Q5_K, space)
    out[:, :16], out[:, 16:48], out[:, 48:] = scales, packing.single_bits(codes >> 4), packing.nibbles(codes, 32)


def q6_k(x: Floats, importance: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """16 groups of 16: scales of 8 bits, codes from 0 to 63 that stand for -32 to 31."""
    import numpy as np

    groups = lanes(x, 16, "x", space)
    if importance is None:
        weights = np.multiply(groups, groups, out=space.floats("weights", *groups.shape))
    else:
        weights = lanes(importance, 16, "weights", space)
    scales, codes = fit_symmetric(groups, weights, 32, space)
    by_group = _of_blocks(scales, 16)
    largest = extreme(by_group)
    zero = np.abs(largest) < np.float32(TINIEST)
    largest[zero] = 1
    factors = np.float32(-128) / largest
    rounded = np.minimum(nearest(factors * by_group), 127).astype(np.int8)
    half = halves(np.float32(1) / factors, DType.Q6_K)
    recoded = by_block(_recoded(groups, _times(half, rounded), -32, 31, codes, space), _SIZE)
    out[:, :128] = packing.nibbles(recoded, 64)
    out[:, 128:192] = packing.pairs(recoded >> 4)
    out[:, 192:208] = as_bytes(rounded.T)
    out[:, 208:] = as_bytes(half)
    out[zero] = 0


def _four_or_five(
    x: Floats,
    importance: Floats | None,
    limit: int,
    tries: tuple[float, float, int],
    dtype: DType,
    space: Space,
) -> tuple[Bytes, Bytes]:
    """What Q4_K and Q5_K share: the first 16 bytes of each block, and the codes `[blocks, 256]`."""
    import numpy as np

    groups = lanes(x, 32, "x", space)
    if importance is None:
        work = np.multiply(groups, groups, out=space.floats("work", *groups.shape))
        means = np.sqrt(total(work) / np.float32(32))
        weights = np.abs(groups, out=space.floats("weights", *groups.shape))
        weights += means
        scales, minima, codes = fit_with_minimum(groups, weights, limit, tries, space)
        factor, of_scales = _against_largest(_of_blocks(scales, 8), 63)
        minimum, of_minima = _against_largest(_of_blocks(-minima, 8), 63)
        of_scales, of_minima = np.minimum(of_scales, 63), np.minimum(of_minima, 63)
    else:
        weights = weighed(groups, importance, _mean_squares(x, 32, 2, space), space)
        scales, minima, codes = fit_with_minimum(groups, weights, limit, _TRIES, space)
        sums = _of_blocks(total(weights), 8)
        factor, of_scales = fit_positive(_of_blocks(scales, 8), sums, 63)
        minimum, of_minima = fit_positive(_of_blocks(-minima, 8), sums, 63)
        if dtype is DType.Q5_K:
            of_scales, of_minima = np.minimum(of_scales, 63), np.minimum(of_minima, 63)
    both = np.stack([halves(factor, dtype), halves(minimum, dtype)], axis=1)
    packed = packing.six_bit_pairs(of_scales.T, of_minima.T)
    of_scales, of_minima = packing.from_six_bit_pairs(packed)
    d, m = _times(both[:, 0], of_scales.T), _times(both[:, 1], of_minima.T)
    recoded = by_block(_recoded(groups, d, 0, limit, codes, space, m), _SIZE)
    return np.concatenate([as_bytes(both), packed], axis=1), recoded


def _of_blocks(values: Floats, count: int) -> Floats:
    """Numbers by lane as `[count, blocks]`."""
    import numpy as np

    return np.ascontiguousarray(values.reshape(-1, count).T)


def _times(scales: NDArray[np.float16], codes: NDArray[np.int8] | Bytes) -> Floats:
    """The scales of groups, by lane, of those of blocks and codes `[count, blocks]`."""
    import numpy as np

    return (scales.astype(np.float32)[:, None] * codes.T.astype(np.float32)).reshape(-1)


def _mean_squares(x: Floats, count: int, factor: int, space: Space) -> Floats:
    """`factor` times the mean square of each block, by lane."""
    import numpy as np

    squares = np.multiply(x, x, out=space.floats("terms", x.size)).reshape(-1, _SIZE)
    sums = np.add.accumulate(squares, axis=1, out=squares)[:, -1]
    return np.repeat(np.float32(factor) * sums / np.float32(_SIZE), _SIZE // count)


def _against_largest(values: Floats, limit: int) -> tuple[Floats, Bytes]:
    """Numbers `[count, blocks]` in steps, of which the largest is `limit`, and the size of a step."""
    import numpy as np

    largest = np.maximum.reduce(values, axis=0, initial=np.float32(0)) + np.float32(0)  # which is no negative zero
    factors = np.where(largest > 0, np.float32(limit) / largest, np.float32(0))
    return largest / np.float32(limit), nearest(factors * values).astype(np.uint8)


def _recoded(
    groups: Floats, d: Floats, low: int, high: int, searched: Codes, space: Space, minimum: Floats | None = None
) -> NDArray[np.uint8]:
    """Codes by the rounded scale `d` (and `minimum`) of each lane, with `-low` added; as searched where `d` is 0."""
    import numpy as np

    work = space.floats("work", *groups.shape)
    if minimum is None:
        np.divide(groups, d, out=work)
    else:
        np.add(groups, minimum, out=work)
        work /= d
    codes = (np.clip(nearest(work), low, high) - low).astype(np.uint8)
    zero = np.flatnonzero(d == 0)
    if zero.size:
        codes[:, zero] = searched(zero)
    return codes
