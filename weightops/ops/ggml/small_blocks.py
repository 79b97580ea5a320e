"""Encoders of ggml's blocks of 32 elements: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

A block has a float16 scale, and in Q4_1 and Q5_1 a float16 minimum, and a code for each element. Without importance the
scale is that of the extreme of a block (`quantize_row_*_ref`); with it, the best of some tries (`quantize_row_*_impl`),
which weigh errors by importance times the magnitude against that of the row. Q8_0 takes no notice of importance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.ops.ggml.packing import as_bytes, by_block, fifth_bits, halves, lanes, nibbles
from weightops.ops.ggml.search import extreme, fit_symmetric, fit_with_minimum, smallest
from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from weightops.ops.ggml.space import Bytes, Floats, Space

_SIZE = 32
_TRIES = (-0.9, 0.05, 36)
_SIGN = 0x80000000
_BELOW_HALF = 0x3EFFFFFF
"""The bits of the largest float32 below 0.5."""


def q8_0(x: Floats, weights: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """A block is `scale = max|x| / 127` and `round(x / scale)`, halves away from zero."""
    import numpy as np

    target = out.view(np.dtype([("scale", "<f2"), ("codes", "V32")]))[:, 0]
    scaled, other = space.floats("work", x.size), space.floats("terms", x.size)
    codes = space.floats("codes", -(-x.size // 4)).view(np.int8)[: x.size]
    np.abs(x, out=scaled)
    scales = _fold(scaled, np.maximum, other) / np.float32(127)
    target["scale"] = halves(scales, DType.Q8_0)
    np.multiply(x.reshape(-1, _SIZE), _factors(scales)[:, None], out=scaled.reshape(-1, _SIZE))
    # Adding 0.5 rounds up what is just below a half. The next smaller number does not, and exact halves still reach
    # the next integer, so that cutting off the fraction rounds them away from zero.
    bump = np.bitwise_and(scaled.view(np.uint32), np.uint32(_SIGN), out=other.view(np.uint32))
    bump |= np.uint32(_BELOW_HALF)
    scaled += other
    np.copyto(codes, scaled, casting="unsafe")
    target["codes"] = codes.view("V32")


def q4_0(x: Floats, weights: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """Codes from 0 to 15 that stand for -8 to 7, two to a byte, 16 elements apart."""
    if weights is None:
        _q4_0(x, out, space)
    else:
        codes, scales = _symmetric(x, weights, columns, 8, DType.Q4_0, space)
        out[:, :2], out[:, 2:] = scales, nibbles(codes, 16)


def _q4_0(x: Floats, out: Bytes, space: Space) -> None:
    """Without importance, in a third of the time: `min(int(x / scale + 8.5), 15)`, without a turn to lanes."""
    import numpy as np

    target = out.view(np.dtype([("scale", "<f2"), ("codes", "V16")]))[:, 0]
    scaled, other = space.floats("work", x.size), space.floats("terms", x.size)
    codes = space.floats("codes", -(-x.size // 4)).view(np.uint8)[: x.size]
    blocks, top, bottom = x.reshape(-1, _SIZE), _fold(x, np.maximum, scaled), _fold(x, np.minimum, other)
    largest: Floats = np.where(top > -bottom, top, bottom)
    tied = np.flatnonzero(top == -bottom)
    largest[tied] = extreme(blocks[tied].T)
    scales: Floats = largest / np.float32(-8)
    target["scale"] = halves(scales, DType.Q4_0)
    factors = _factors(scales)
    np.multiply(blocks, factors[:, None], out=scaled.reshape(-1, _SIZE))
    scaled += np.float32(8.5)
    np.copyto(codes, scaled, casting="unsafe")
    codes.reshape(-1, _SIZE)[(factors == 0) & (scales != 0)] = 0  # as ggml casts what is infinite or no number
    # Eight codes to a word. 16 becomes 15, and is the only one above.
    words, shifted = codes.view(np.uint64), other.view(np.uint64)[: x.size // 8]
    np.right_shift(words, np.uint64(4), out=shifted)
    shifted &= np.uint64(0x0101010101010101)
    words -= shifted
    # A block is two low words and two high ones: of the sums of words two apart, every other pair is wanted.
    np.left_shift(words, np.uint64(4), out=shifted)
    words[:-2] |= shifted[2:]
    target["codes"] = words.view("V16")[::2]


def q5_0(x: Floats, weights: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """Codes from 0 to 31 that stand for -16 to 15: the fifth bits of all, then four bits as in Q4_0."""
    codes, scales = _symmetric(x, weights, columns, 16, DType.Q5_0, space)
    out[:, :2], out[:, 2:6], out[:, 6:] = scales, fifth_bits(codes), nibbles(codes, 16)


def q4_1(x: Floats, weights: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """Codes from 0 to 15, in steps of the scale from the minimum on."""
    codes, scales = _with_minimum(x, weights, columns, 15, DType.Q4_1, space)
    out[:, :4], out[:, 4:] = scales, nibbles(codes, 16)


def q5_1(x: Floats, weights: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """Codes from 0 to 31, in steps of the scale from the minimum on."""
    codes, scales = _with_minimum(x, weights, columns, 31, DType.Q5_1, space)
    out[:, :4], out[:, 4:8], out[:, 8:] = scales, fifth_bits(codes), nibbles(codes, 16)


def _symmetric(
    x: Floats, weights: Floats | None, columns: int, limit: int, dtype: DType, space: Space
) -> tuple[Bytes, Bytes]:
    """Codes from 0 to `2 limit - 1`, which stand for `-limit` on, and the bytes of the scales.

    Without importance the first x of the largest magnitude is exactly `-limit` times the scale.
    """
    import numpy as np

    groups = lanes(x, _SIZE, "x", space)
    if weights is not None:
        scales, codes = fit_symmetric(groups, _weights(x, groups, weights, columns, space), limit, space)
        return by_block(codes(slice(None)), _SIZE), as_bytes(halves(scales, dtype))
    scales = extreme(groups) / np.float32(-limit)
    scaled = np.multiply(groups, _factors(scales), out=space.floats("work", *groups.shape))
    scaled += np.float32(limit + 0.5)
    return by_block(_whole(scaled, scales, 2 * limit - 1), _SIZE), as_bytes(halves(scales, dtype))


def _with_minimum(
    x: Floats, weights: Floats | None, columns: int, limit: int, dtype: DType, space: Space
) -> tuple[Bytes, Bytes]:
    """Codes from 0 to `limit`, and the bytes of the scales and minima."""
    import numpy as np

    groups = lanes(x, _SIZE, "x", space)
    if weights is not None:
        weighed = _weights(x, groups, weights, columns, space)
        scales, minima, best = fit_with_minimum(groups, weighed, limit, _TRIES, space)
        codes = best(slice(None))
    else:
        minima, top = smallest(groups), np.maximum.reduce(groups, axis=0)
        scales = np.where(top == minima, np.float32(0), (top - minima) / np.float32(limit))
        scaled = np.subtract(groups, minima, out=space.floats("work", *groups.shape))
        scaled *= _factors(scales)
        scaled += np.float32(0.5)
        codes = _whole(scaled, scales, limit)
    both = np.stack([halves(scales, dtype), halves(minima, dtype)], axis=1)
    return by_block(codes, _SIZE), as_bytes(both)


def _weights(x: Floats, groups: Floats, importance: Floats, columns: int, space: Space) -> Floats:
    """Importance times the root of the row's mean square and the element's square, for each lane."""
    import numpy as np

    squares = np.multiply(x, x, out=space.floats("terms", x.size)).reshape(-1, columns)
    # `accumulate` adds one after the other, where `sum` would add by pairs.
    means = np.add.accumulate(squares, axis=1, out=squares)[:, -1] / np.float32(columns)
    return weighed(groups, importance, np.repeat(means, columns // _SIZE), space)


def weighed(groups: Floats, importance: Floats, means: Floats, space: Space) -> Floats:
    """`importance * sqrt(means + x * x)`, `means` by lane."""
    import numpy as np

    factors = lanes(importance, len(groups), "importance of lanes", space)
    out = np.multiply(groups, groups, out=space.floats("weights", *groups.shape))
    out += means
    np.sqrt(out, out=out)
    return np.multiply(factors, out, out=out)


def _factors(scales: Floats) -> Floats:
    """From elements to codes; 0 for scales of zero, and for those so small that it would be infinite."""
    import numpy as np

    found = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    found[np.isinf(found)] = 0
    return found


def _whole(scaled: Floats, scales: Floats, limit: int) -> NDArray[np.uint8]:
    """The codes, cut off to integers; `limit` at most. Where the factor from scales was infinite ggml has 0."""
    import numpy as np

    codes = np.minimum(scaled.astype(np.uint8), np.uint8(limit))
    codes[:, (_factors(scales) == 0) & (scales != 0)] = 0
    return codes


def _fold(values: Floats, largest: Any, work: Floats) -> Floats:
    """The largest (or smallest) of each block, NaN where it has one; a part of `work`."""
    begin = 0
    for _ in range(5):
        end = begin + values.size // 2
        values = largest(values[::2], values[1::2], out=work[begin:end])
        begin = end
    return values
