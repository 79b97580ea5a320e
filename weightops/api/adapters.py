"""Commands on LoRA adapters: combine several, change ranks, convert names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from weightops.api.outputs import Output, one
from weightops.recipes.execute import Result, StrPath, several


def combine_adapters(
    adapter: Sequence[StrPath],
    out: StrPath,
    *,
    method: str = "cat",
    weight: float | Sequence[float] = (),
    density: float | None = None,
    rank: int | None = None,
    vote: str = "total",
    seed: int = 0,
    dtype: str | None = None,
    **output: Unpack[Output],
) -> Result:
    """Make one adapter of several; see `weightops.operations.combine_adapters`."""
    options: dict[str, Any] = {"method": method, "weight": several(weight), "density": density, "rank": rank}
    options |= {"vote": vote, "seed": seed, "dtype": dtype}
    return one("combine-adapters", {"adapter": adapter}, out, output, options)
