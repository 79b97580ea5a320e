"""Encoders of IQ4_NL and IQ4_XS, whose codes are places in a table of 16 numbers that lie closer near zero.

IQ4_NL has blocks of 32 elements with a float16 scale, IQ4_XS blocks of 256 with a float16 scale and 6 bits for each 32.
Source: `quantize_row_iq4_nl_impl` with 7 tries to either side.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from weightops.ops.ggml.blocks import IQ4_VALUES
from weightops.ops.ggml.packing import as_bytes, by_block, halves, lanes, nibbles
from weightops.ops.ggml.search import TINIEST, extreme, nearest, total
from weightops.ops.ggml.small_blocks import weighed
from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from weightops.ops.ggml.space import Bytes, Floats, Space

_REACH = 256
_TRIES = 7


def iq4_nl(x: Floats, importance: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """A float16 scale and 32 codes of the table."""
    import numpy as np

    groups = lanes(x, 32, "x", space)
    scales = _fit(x, groups, importance, 32, space)
    factors = np.where(scales != 0, np.float32(1) / scales, np.float32(0))
    out[:, :2] = as_bytes(halves(scales, DType.IQ4_NL))
    out[:, 2:] = nibbles(by_block(_codes(groups, factors, space), 32), 16)


def iq4_xs(x: Floats, importance: Floats | None, columns: int, out: Bytes, space: Space) -> None:
    """8 groups of 32: scales of 6 bits, and codes of the table."""
    import numpy as np

    groups = lanes(x, 32, "x", space)
    scales = _fit(x, groups, importance, 256, space).reshape(-1, 8)
    step = -extreme(np.ascontiguousarray(scales.T))[:, None] / np.float32(32)
    inverse = np.where(step != 0, np.float32(1) / step, np.float32(0))
    rounded = np.clip(nearest(inverse * scales), -32, 31)
    d = step * rounded.astype(np.float32)
    factors = np.where(d != 0, np.float32(1) / d, np.float32(0))
    stored = (rounded + 32).astype(np.uint16)
    out[:, :2] = as_bytes(halves(step, DType.IQ4_XS))
    high = np.bitwise_or.reduce((stored >> 4) << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    out[:, 2:4] = as_bytes(high.astype("<u2"))
    out[:, 4:8] = nibbles(stored.astype(np.uint8), 1)
    out[:, 8:] = nibbles(by_block(_codes(groups, factors.reshape(-1), space), 256), 16)


def _fit(x: Floats, groups: Floats, importance: Floats | None, size: int, space: Space) -> Floats:
    """The best scale of each lane; 0 for zeros."""
    import numpy as np

    count, lanes = groups.shape
    if importance is None:
        weights = np.multiply(groups, groups, out=space.floats("weights", count, lanes))
    else:
        squares = np.multiply(x, x, out=space.floats("terms", x.size)).reshape(-1, size)
        means = np.add.accumulate(squares, axis=1, out=squares)[:, -1] * np.float32(2 / size)
        weights = weighed(groups, importance, np.repeat(means, size // 32), space)
    terms, table = space.floats("terms", count, 2, lanes), _tables()[1]
    places = space.floats("places", count, lanes, 2).view(np.intp).reshape(count, lanes)
    largest = extreme(groups)
    zero = np.abs(largest) < np.float32(TINIEST)
    largest[zero] = 1

    def sums(factor: Floats) -> tuple[Floats, Floats]:
        _places(groups, factor, terms[:, 0], places)
        values = table.take(places, out=space.floats("work", count, lanes), mode="clip")
        np.multiply(weights, values, out=terms[:, 1])
        np.multiply(terms[:, 1], groups, out=terms[:, 0])
        np.multiply(terms[:, 1], values, out=terms[:, 1])
        products, squares = total(terms)
        return products, squares

    first = np.float32(IQ4_VALUES[0])
    products, squares = sums(np.float32(1) / (-largest / first))
    scales = np.where(squares > 0, products / squares, np.float32(0))
    best = scales * products
    for step in range(-_TRIES, _TRIES + 1):
        products, squares = sums((np.float32(step) + first) / largest)
        better = (squares > 0) & (products * products > best * squares)
        np.copyto(scales, products / squares, where=better)
        np.copyto(best, scales * products, where=better)
    scales[zero] = 0
    return scales


def _codes(groups: Floats, factors: Floats, space: Space) -> NDArray[np.uint8]:
    """Of each element the place of the value nearest to it times the factor."""
    import numpy as np

    places = space.floats("places", *groups.shape, 2).view(np.intp).reshape(groups.shape)
    _places(groups, factors, space.floats("work", *groups.shape), places)
    return _tables()[0].take(places, mode="clip")


def _places(groups: Floats, factors: Floats, work: Floats, out: NDArray[np.intp]) -> None:
    """Where each element times the factor lies in the tables, which have a place for every half."""
    import numpy as np

    np.multiply(groups, factors, out=work)
    np.add(work, work, out=work)
    np.floor(work, out=work)
    np.fmin(work, np.float32(_REACH - 1), out=work)  # of what is not a number the last, as in C
    np.maximum(work, np.float32(-_REACH), out=work)
    np.add(work, np.float32(_REACH), out=out, casting="unsafe")


@cache
def _tables() -> tuple[NDArray[np.uint8], Floats]:
    """The code for each half from -128 on, and its value.

    ggml compares the distances to the values below and above, and takes the upper one if they are equal. Every midpoint
    is a multiple of a half, so that the half below a number says which value is nearest; and near a midpoint the
    distances are exact.
    """
    import numpy as np

    values = np.array(IQ4_VALUES, np.float32)
    halfway = (values[1:] + values[:-1]) / 2
    codes = np.searchsorted(halfway, np.arange(-_REACH, _REACH) / 2, side="right").astype(np.uint8)
    return codes, values[codes]
