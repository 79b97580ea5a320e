"""Floating-point tensors as integers: comparing and masking integers takes a tenth of what torch's comparisons do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Bits = NDArray[Any]


def bits_of(x: torch.Tensor) -> Bits:
    """The tensor's memory as signed integers of the same size."""
    import torch

    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    found: Bits = x.contiguous().view(kinds[x.element_size()]).numpy()
    return found


def magnitudes(x: torch.Tensor) -> Bits:
    """Unsigned integers in the order of the numbers' sizes, NaN above infinity; of float64 those of float32."""
    import numpy as np
    import torch

    bits = bits_of(x.float() if x.dtype == torch.float64 else x)
    return (bits & np.iinfo(bits.dtype).max).view(f"u{bits.itemsize}")


def ordered(x: torch.Tensor) -> Bits:
    """Unsigned integers in the order of the numbers of a tensor of 16 or 32 bits, with their signs."""
    import numpy as np

    bits = bits_of(x)
    lowest = np.iinfo(bits.dtype).min
    return np.where(bits < 0, ~bits, bits ^ lowest).view(f"u{bits.itemsize}")


def number_of(key: int, dtype: torch.dtype) -> float:
    """The number of a type of 16 or 32 bits whose place in the order of all is `key`."""
    import torch

    bits = torch.finfo(dtype).bits
    top = 1 << (bits - 1)
    word = key ^ top if key & top else ~key & (2 * top - 1)
    kind = torch.int16 if bits == 16 else torch.int32
    return float(torch.tensor(word - 2 * top if word & top else word, dtype=kind).view(dtype))


def keep(x: torch.Tensor, mask: Bits) -> torch.Tensor:
    """`x * mask` for a mask of bools: what is dropped is a zero with its sign, and NaN if it was not finite."""
    import math

    import numpy as np
    import torch

    if not math.isfinite(x.sum().item()):
        return x * torch.from_numpy(mask)
    bits = bits_of(x)
    return torch.from_numpy(bits & (all_or_none(mask, bits.dtype) | np.iinfo(bits.dtype).min)).view(x.dtype)


def all_or_none(mask: Bits, dtype: Any) -> Bits:
    """Integers with all bits set where the mask is true."""
    import numpy as np

    return np.negative(mask.view(np.int8)).astype(dtype)


def add(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack(parts).sum(dim=0)` to the bit, of blocks of whole tensors that begin at a multiple of 32 elements.

    16-bit types are added in float32 and rounded once; torch's own sum over few large tensors is slow. Of more than
    four it adds the last elements, fewer than 32, in another order; rows, which begin anywhere, are all added in one.
    """
    import torch

    dtype = parts[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if len(parts) > 4 and parts[0].dim() < 2:
        return torch.stack(list(parts)).sum(dim=0)
    total = torch.zeros((), dtype=wide) + parts[0].to(wide)
    for part in parts[1:]:
        total += part.to(wide)
    return total.to(dtype)


def l1_norm(x: torch.Tensor) -> float:
    """The sum of sizes, in float64: whatever order a processor adds in, it is the same once it is rounded."""
    import torch

    return float(x.abs().sum(dtype=torch.float64))
