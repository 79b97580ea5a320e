"""ggml's searches for the scale of a few numbers, for many groups of them at once, to the bit of its C.

Arrays are `[positions, lanes]`: a lane is a group of 16 or 32 numbers that share a scale, or the scales of one block.
All lanes take the same step at the same time, and a sum adds up one position after the other, as a loop in C does. That
is float32 without fused multiply-add, in the order of ggml's source (`ggml-quants.c`), whose functions are named here.

A search tries factors, and keeps the best. The codes that go with it are worked out again by who wants them, which
costs one try of twenty, where keeping them would cost as much in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from weightops.ops.ggml.space import Floats, Space

    Integers = NDArray[np.int32]
    Codes = Callable[[Any], NDArray[np.uint8]]
    """Codes `[positions, lanes]` of the lanes that are asked for, by number or as a slice."""

TINIEST = 1e-15
"""Groups whose numbers are all smaller than this are zeros (`GROUP_MAX_EPS`)."""
_TO_INTEGERS = 12582912.0
"""1.5 times 2 ** 23: added to a small number, it leaves the nearest integer in the lowest 23 bits."""
_REACH = 4194000.0
"""Numbers below this are rounded by that as by anything else."""


def nearest(values: Floats) -> Integers:
    """The nearest integers, ties to even, in the memory of `values`; of what is beyond 22 bits, what C makes of it."""
    import numpy as np

    values += np.float32(_TO_INTEGERS)
    bits: Integers = values.view(np.int32)
    bits &= np.int32(0x7FFFFF)
    bits -= np.int32(0x400000)
    return bits


def total(values: Floats, start: float = 0.0) -> Floats:
    """The sum over positions, from `start` on and one after the other."""
    import numpy as np

    found: Floats
    if values[0].size > 1:
        found = np.add.reduce(values, axis=0, initial=np.float32(start))
    else:  # which `reduce` would add up by pairs
        found = np.add.accumulate(values, axis=0)[-1] + np.float32(start)
    return found


def extreme(x: Floats) -> Floats:
    """Of each lane the number of the largest magnitude: of several the first, and of zeros the positive one."""
    import numpy as np

    top, bottom = np.maximum.reduce(x, axis=0), np.minimum.reduce(x, axis=0)
    found: Floats = bottom.copy()
    np.copyto(found, top, where=top > -bottom)
    tied = np.flatnonzero(top == -bottom)
    if tied.size:
        some = x[:, tied]
        found[tied] = some[np.abs(some).argmax(axis=0), np.arange(tied.size)] + np.float32(0)
    return found


def smallest(x: Floats) -> Floats:
    """Of each lane the smallest number; of zeros that differ in sign the first."""
    import numpy as np

    found: Floats = np.minimum.reduce(x, axis=0)
    zeros = np.flatnonzero(found == 0)
    if zeros.size:
        some = x[:, zeros]
        found[zeros] = some[(some == 0).argmax(axis=0), np.arange(zeros.size)]
    return found


def fit_symmetric(x: Floats, weights: Floats, limit: int, space: Space) -> tuple[Floats, Codes]:
    """Scales for codes from `-limit` to `limit - 1`, by 19 tries (`make_qx_quants` with `rmse_type` 1).

    The codes that it gives have `limit` added; those of zeros are 0.
    """
    import numpy as np

    one = np.float32(1)
    count, lanes = x.shape
    terms, weighted = space.floats("terms", count, 2, lanes), space.floats("weighted", count, lanes)
    np.multiply(weights, x, out=weighted)
    largest = extreme(x)
    zero = np.abs(largest) < np.float32(TINIEST)
    largest[zero] = one

    def sums(factor: Floats) -> tuple[Floats, Floats]:
        codes = terms[:, 0]
        np.multiply(x, factor, out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, np.float32(-limit), np.float32(limit - 1), out=codes)
        np.multiply(weights, codes, out=terms[:, 1])
        np.multiply(terms[:, 1], codes, out=terms[:, 1])
        np.multiply(weighted, codes, out=codes)
        products, squares = total(terms)
        return products, squares

    factors = -np.float32(limit) / largest
    products, squares = sums(factors)
    scales = np.where(squares != 0, products / squares, np.float32(0))
    best = scales * products
    for step in (*range(-9, 0), *range(1, 10)):
        tried = -(np.float32(limit) + np.float32(0.1) * np.float32(step)) / largest
        products, squares = sums(tried)
        better = (squares > 0) & (products * products > best * squares)
        np.copyto(scales, products / squares, where=better)
        np.copyto(best, scales * products, where=better)
        np.copyto(factors, tried, where=better)

    def codes(some: Any) -> NDArray[np.uint8]:
        found: Floats = np.clip(np.rint(x[:, some] * factors[some]), np.float32(-limit), np.float32(limit - 1))
        found += np.float32(limit)
        found[:, zero[some]] = 0
        return found.astype(np.uint8)

    return scales, codes


def fit_with_minimum(
    x: Floats, weights: Floats, limit: int, tries: tuple[float, float, int], space: Space, *, absolute: bool = False
) -> tuple[Floats, Floats, Codes]:
    """Scales and minima (none above 0) for codes from 0 to `limit` (`make_qkx2_quants` and `make_qkx3_quants`).

    `tries` are the first change to `limit`, the step and the number of steps; the error is squared or `absolute`.
    """
    import numpy as np

    count, lanes = x.shape
    terms, work = space.floats("terms", count, 3, lanes), space.floats("work", count, lanes)
    highest, lowest = np.maximum.reduce(x, axis=0), smallest(x)
    start = np.where(lowest > 0, np.float32(0), lowest)
    flat = highest == start
    highest[flat] = 1
    # These begin with the first number, which an addition to a negative zero leaves as it is.
    sum_w, sum_x = total(weights, -0.0), total(np.multiply(weights, x, out=work), -0.0)

    def encode(factor: Floats, minimum: Floats, out: Floats, values: Floats, low: Floats, high: Floats) -> Floats:
        np.subtract(values, minimum, out=out)
        np.multiply(out, factor, out=out)
        if (factor * np.maximum(high - minimum, minimum - low) < np.float32(_REACH)).all():
            np.rint(out, out=out)
        else:
            out[:] = nearest(out)
        return np.clip(out, np.float32(0), np.float32(limit), out=out)

    def error(scale: Floats, minimum: Floats) -> Floats:
        np.multiply(work, scale, out=work)
        np.add(work, minimum, out=work)
        np.subtract(work, x, out=work)
        if absolute:
            np.abs(work, out=work)
        else:
            np.multiply(work, work, out=work)
        np.multiply(weights, work, out=work)
        return total(work)

    minima = start.copy()
    factors = np.float32(limit) / (highest - minima)
    scales = np.float32(1) / factors
    encode(factors, minima, work, x, lowest, highest)
    used, best = minima.copy(), error(scales, minima)
    first, delta, steps = (np.float32(tries[0]), np.float32(tries[1]), tries[2])
    for step in range(steps + 1):
        tried = (first + delta * np.float32(step) + np.float32(limit)) / (highest - minima)
        encode(tried, minima, work, x, lowest, highest)
        np.multiply(weights, work, out=terms[:, 0])
        np.multiply(terms[:, 0], work, out=terms[:, 1])
        np.multiply(terms[:, 0], x, out=terms[:, 2])
        sum_l, sum_l2, sum_xl = total(terms)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = minimum > 0
        minimum[above] = 0
        np.copyto(scale, sum_xl / sum_l2, where=above)
        errors = error(scale, minimum)
        better = (determinant > 0) & (errors < best)
        for kept, new in ((best, errors), (scales, scale), (factors, tried), (used, minima), (minima, minimum)):
            np.copyto(kept, new, where=better)
    scales[flat], minima[flat], factors[flat] = 0, start[flat], 0

    def codes(some: Any) -> NDArray[np.uint8]:
        values = x[:, some]
        return encode(factors[some], used[some], np.empty_like(values), values, lowest[some], highest[some]).astype(
            np.uint8
        )

    return scales, minima, codes


def fit_by_turns(x: Floats, limit: int) -> tuple[Floats, NDArray[np.int8]]:
    """Scales and codes from `-limit` to `limit - 1`, changed one at a time, five times over (`make_q3_quants`)."""
    import numpy as np

    largest = extreme(x)
    zero = np.abs(largest) < np.float32(TINIEST)
    largest[zero] = 1
    weights = x * x
    low, high = np.float32(-limit), np.float32(limit - 1)
    codes = np.clip(np.rint((-np.float32(limit) / largest) * x), low, high)

    def bounded(values: Integers) -> Floats:
        return np.clip(values, -limit, limit - 1).astype(np.float32)

    scales = _take_turns(x, weights, codes, bounded, lambda codes: codes)
    scales[zero] = 0
    codes += np.float32(limit)
    codes[:, zero] = 0
    return scales, codes.astype(np.int8)


def fit_positive(x: Floats, weights: Floats, limit: int) -> tuple[Floats, NDArray[np.uint8]]:
    """Scales for codes from 0 to `limit`, by 9 tries and then one at a time (`make_qp_quants`)."""
    import numpy as np

    top = np.maximum.reduce(x, axis=0, initial=np.float32(0))
    zero = top < np.float32(TINIEST)
    top[zero] = 1
    factors = np.float32(limit) / top

    def bounded(values: Integers) -> Floats:
        return np.minimum(values, limit).astype(np.float32)

    def as_bytes(codes: Floats) -> Floats:
        return codes.astype(np.int32).astype(np.uint8).astype(np.float32)

    def error(factor: Floats, codes: Floats) -> Floats:
        difference = x - (np.float32(1) / factor) * codes
        return total(weights * difference * difference)

    best = error(factors, as_bytes(nearest(factors * x).astype(np.float32)))
    for step in (*range(-4, 0), *range(1, 5)):
        tried = (np.float32(0.1) * np.float32(step) + np.float32(limit)) / top
        errors = error(tried, bounded(nearest(tried * x)))
        better = errors < best
        np.copyto(best, errors, where=better)
        np.copyto(factors, tried, where=better)
    codes = bounded(nearest(factors * x))
    scales = _take_turns(x, weights, codes, bounded, as_bytes, positive=True)
    scales[zero], codes[:, zero] = 0, 0
    return scales, codes.astype(np.uint8)


def _take_turns(
    x: Floats,
    weights: Floats,
    codes: Floats,
    bounded: Callable[[Integers], Floats],
    stored: Callable[[Floats], Floats],
    *,
    positive: bool = False,
) -> Floats:
    """Change a code wherever that makes the fit better, position by position, in `codes`; gives the scales.

    `bounded` keeps new codes in their range, `stored` is what a byte makes of them; with `positive` both sums must be.
    """
    import numpy as np

    weighted = weights * x
    products, squares = total(weighted * codes), total(weights * codes * codes)
    codes[:] = stored(codes)
    some: Any = slice(None)
    for _ in range(5):
        # Whatever has not changed in one turn would not in the next.
        now, product, square = codes[:, some], products[some], squares[some]
        changed = np.zeros(product.size, bool)
        positions = zip(x[:, some], weights[:, some], weighted[:, some], now, strict=True)
        for value, weight, both, code in positions:
            new_product, new_square = product - both * code, square - weight * code * code
            better = new_product > 0
            if positive:
                better &= new_square > 0
            new = bounded(nearest(value * new_square / new_product))
            better &= new != code
            new_product += both * new
            new_square += weight * new * new
            better &= new_square > 0
            better &= new_product * new_product * square > product * product * new_square
            changed |= better
            for kept, found in ((code, stored(new)), (product, new_product), (square, new_square)):
                np.copyto(kept, found, where=better)
        codes[:, some], products[some], squares[some] = now, product, square
        some = np.arange(products.size)[some][changed]
        if not some.size:
            break
    return np.where(squares > 0, products / squares, np.float32(0))
