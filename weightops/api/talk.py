"""The Python API of models that speak to somebody: several in one memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.api.models import ComputeDType, for_models, opened
from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.formats.places import is_remote
from weightops.recipes.execute import StrPath

if TYPE_CHECKING:
    from weightops.inference.packed import Engine
    from weightops.inference.pool import Pool


def open_pool(
    models: Mapping[str, StrPath | Checkpoint],
    *,
    dtype: ComputeDType = "float32",
    device: str = "auto",
    engine: Engine = "auto",
    max_memory: str | int | None = None,
    control: Control | None = None,
) -> Pool:
    """Models by name in one memory, ready to be asked by `submit`; close it, or use it in a `with` block.

    A source may be a checkpoint that an operation has derived, or `BASE+ADAPTER`: a model with a LoRA adapter merged
    into it as its weights are read. See `weightops.inference.pool`.
    """
    import torch

    from weightops.inference.model import pick_device
    from weightops.inference.opened import Opened
    from weightops.inference.pool import Pool, Stoppable

    control = control or Control()
    place = pick_device(device)
    with control.stores.connected():
        found = {
            name: Opened(
                opened_merged(source, control),
                dtype=getattr(torch, dtype),
                device=place,
                engine=engine,
                control=Stoppable(control),
            )
            for name, source in models.items()
        }
    return Pool(found, for_models(max_memory))


def opened_merged(source: StrPath | Checkpoint, control: Control) -> Checkpoint:
    """A checkpoint, at a path or of a base and adapters that are joined by `+`."""
    places = [source] if isinstance(source, Checkpoint) else places_of(str(source))
    base, *adapters = (opened(place, control) for place in places)
    if not adapters:
        return base
    from weightops.engine.values import values
    from weightops.operations.merge_lora import merge_lora

    return merge_lora(base, adapters, evaluate=lambda tensors: values(tensors, control))


def places_of(source: str) -> list[str]:
    """The places in `BASE+ADAPTER`; a `+` belongs to a path if that is there, or nothing is after it."""
    if "+" not in source or (not is_remote(source) and Path(source).exists()):
        return [source]
    found: list[str] = []
    for part in source.split("+"):
        if found and not (is_remote(part) or Path(part).exists()):
            found[-1] += f"+{part}"
        else:
            found.append(part)
    return found
