"""The Python API of models that speak to somebody: several in one memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from weightops.api.models import ComputeDType, for_models, opened_merged
from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.inference.asked import Asked, settings_of
from weightops.recipes.planning import StrPath

if TYPE_CHECKING:
    from weightops.inference.batch import BatchDocument
    from weightops.inference.chat import Chat
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


def chat(
    source: StrPath | Checkpoint,
    *,
    system: str | None = None,
    template: StrPath | None = None,
    dtype: ComputeDType = "float32",
    device: str = "auto",
    engine: Engine = "auto",
    max_memory: str | int | None = None,
    control: Control | None = None,
    **settings: Unpack[Asked],
) -> Chat:
    """A conversation with a model: `say` something, and iterate over the events of the answer. Close it at the end.

    `system` is what is said before; `template` a name or file, by default the tokenizer's own. The weights are loaded
    with the first answer and stay. See `weightops.inference.chat`.
    """
    from weightops.inference.chat import Chat

    wanted = settings_of(settings)
    name = source.name if isinstance(source, Checkpoint) else os.fspath(source)
    pool = open_pool({name: source}, dtype=dtype, device=device, engine=engine, max_memory=max_memory, control=control)
    try:
        return Chat(pool, name, system=system, template=os.fspath(template or "own"), settings=wanted)
    except BaseException:
        pool.close()
        raise


def generate_all(
    source: StrPath | Checkpoint,
    prompts: StrPath,
    out: StrPath,
    *,
    system: str | None = None,
    template: StrPath | None = None,
    chat: bool = False,
    dtype: ComputeDType = "float32",
    device: str = "auto",
    engine: Engine = "auto",
    max_memory: str | int | None = None,
    control: Control | None = None,
    **settings: Unpack[Asked],
) -> BatchDocument:
    """Answer the prompts of a file, and write the answers to the file `out`; the same call goes on after a kill.

    See `weightops.inference.prompt_file` for the one and `weightops.inference.batch` for the other.
    """
    import torch

    from weightops.inference.batch import answer_all
    from weightops.inference.model import pick_device
    from weightops.inference.opened import Opened, room_on
    from weightops.inference.prompt_file import read_prompts

    by_template = None if template is None else os.fspath(template)
    wanted = read_prompts(Path(prompts), settings, chat=chat, system=system, template=by_template)
    control = control or Control()
    place = pick_device(device)
    room = for_models(max_memory)
    with control.stores.connected():
        checkpoint = opened_merged(source, control)
        model = Opened(checkpoint, dtype=getattr(torch, dtype), device=place, engine=engine, control=control)
        return answer_all(model, wanted, Path(out), room=room_on(place) if room is None else room, control=control)
