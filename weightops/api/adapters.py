"""Commands on LoRA adapters: combine several, change ranks, convert names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from weightops.api.outputs import Output, one
from weightops.recipes.execute import Result
from weightops.recipes.planning import StrPath, several


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
    """Make one adapter of several; see `weightops.operations.adapter`."""
    options: dict[str, Any] = {"method": method, "weight": several(weight), "density": density, "rank": rank}
    options |= {"vote": vote, "seed": seed, "dtype": dtype}
    return one("combine-adapters", {"adapter": adapter}, out, output, options)


def resize_adapter(
    adapter: StrPath,
    out: StrPath,
    *,
    rank: int | None = None,
    keep: float | None = None,
    by: str = "squares",
    seed: int = 0,
    dtype: str | None = None,
    **output: Unpack[Output],
) -> Result:
    """Give an adapter another rank, or the ranks that keep a share of it; see `weightops.operations.adapter`."""
    options = {"rank": rank, "keep": keep, "by": by, "seed": seed, "dtype": dtype}
    return one("resize-adapter", {"adapter": adapter}, out, output, options)


def convert_adapter(
    adapter: StrPath,
    out: StrPath,
    *,
    to: str,
    base: StrPath | None = None,
    heads: int | None = None,
    alpha: float | None = None,
    **output: Unpack[Output],
) -> Result:
    """Name and store an adapter as another program does; see `weightops.operations.adapter`."""
    sources = {"adapter": adapter, "base": () if base is None else base}
    return one("convert-adapter", sources, out, output, {"to": to, "heads": heads, "alpha": alpha})
