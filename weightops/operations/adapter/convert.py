"""Convert an adapter between peft, torchtune, LitGPT, mlx-lm and kohya's sd-scripts: names, orders and scales.

Which program's an adapter is, its names say. All are read into modules by the names of transformers, and written from
them; factors keep their bits, but where a program has one scale for all modules and the adapter has several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.carried import Carried, carry, is_of_base
from weightops.formats.adapter.config import settings_of
from weightops.formats.adapter.dialects import kohya, lit, mlx, torchtune
from weightops.formats.adapter.dialects.common import Base, Stored, base_of
from weightops.formats.adapter.files import CONFIG_NAME, refuse_adapter
from weightops.formats.adapter.lora import Adapter, LoraModule, read_adapter
from weightops.formats.adapter.values import differ, scan_tensors
from weightops.formats.adapter.written import PREFIX, lora_config, lora_tensors
from weightops.formats.delta import refuse_delta
from weightops.formats.sidecars import is_tokenizer_file
from weightops.io.escape import escape
from weightops.lazy import Evaluate
from weightops.ops.elementwise import cast
from weightops.spec import DType

Program = Literal["peft", "torchtune", "lit", "mlx", "kohya"]
_ENDS: dict[Program, tuple[str, ...]] = {
    "torchtune": (torchtune.A, torchtune.B),
    "kohya": (kohya.DOWN, kohya.UP),
    "mlx": (mlx.A, mlx.B),
    "lit": (lit.A, lit.B),
}


def convert_adapter(
    adapter: Checkpoint,
    base: Sequence[Checkpoint] = (),
    *,
    to: Program,
    heads: int | None = None,
    alpha: float | None = None,
    evaluate: Evaluate,
) -> Checkpoint:
    """`adapter` as the program `to` names and stores it; whose it is, is found by its names.

    `base` is the model that it is for, or nothing: its config.json says how many heads there are, which torchtune's
    order of rows and LitGPT's joined q, k and v depend on, and its modules say where kohya's underscores are dots.
    `heads`: of q, where there is no base. `alpha`: of an adapter whose own files do not say it.

    Raises `UsageError` for what is not known and has to be said, `IncompatibleInputs` naming what the program has no
    place for, `CorruptInput` for files that contradict themselves and values that are no numbers.
    """
    _check_options(base, heads, alpha)
    refuse_delta(adapter, "the adapter")
    for each in base:
        refuse_delta(each, "the base")
        refuse_adapter(each, "the base")
    known = base_of(base[0]) if base else Base()
    program = program_of(adapter)
    own: Adapter | None = None
    carried = Carried()
    match program:
        case "peft":
            own = read_adapter(adapter)
            modules, carried = list(own.modules()), carry([own], [1.0], evaluate)
        case "torchtune":
            modules = torchtune.read(adapter, known, heads, alpha)
        case "lit":
            modules = lit.read(adapter, known, alpha)
        case "mlx":
            modules = mlx.read(adapter, alpha)
        case "kohya":
            modules = kohya.read(adapter, known, evaluate)
    if not modules:
        raise IncompatibleInputs(f"{escape(adapter.name)}: holds no factors to convert")
    if alpha is not None and program in ("peft", "kohya"):
        raise UsageError(f"alpha has no use: {program}'s adapters say it themselves", hint="leave it out")
    scan_tensors(adapter.name, adapter.tensors, evaluate)
    left = _left_out(adapter, carried, to, base, evaluate)
    stored = _written(to, modules, known, adapter, own, carried, heads)
    tokenizer = {name: file for name, file in adapter.sidecars.items() if is_tokenizer_file(name)}
    said = own.notes if own is not None else ()
    return Checkpoint(
        adapter.name,
        stored.tensors,
        sidecars={**tokenizer, **stored.sidecars},
        warnings=(*said, *stored.notes, *left),
        metadata=stored.metadata,
        prefix=stored.prefix,
        container=stored.container,
        in_one_file=True,
    )


def _left_out(
    adapter: Checkpoint, carried: Carried, to: Program, base: Sequence[Checkpoint], evaluate: Evaluate
) -> list[str]:
    """What a program has no place for and can do without: weights of the base, which peft saves with embeddings.

    Raises `IncompatibleInputs` for anything else beside factors, and for weights that are not those of `base`.
    """
    if to == "peft":
        return []
    where, left = escape(adapter.name), []
    for name, tensor in carried.tensors.items():
        if not is_of_base(name):
            raise IncompatibleInputs(
                f"{where}: holds {escape(name)} beside factors, which {to} has no place for",
                hint="merge-lora merges all of it into the base",
            )
        own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        there = base[0].get(own) if base else None
        if there is None:
            left.append(f"{where}: holds the base's own {escape(own)}, which {to} has no place for: left out")
        elif differ(cast(there, DType.F32), cast(tensor, DType.F32), evaluate):
            raise IncompatibleInputs(
                f"{where}: holds another {escape(own)} than the base, and {to} has no place for it",
                hint="merge-lora merges all of it into the base",
            )
    return left


def _check_options(base: Sequence[Checkpoint], heads: int | None, alpha: float | None) -> None:
    if len(base) > 1:
        raise UsageError(f"there are {len(base)} bases, expected one")
    if heads is not None and heads < 1:
        raise UsageError(f"{heads} heads: expected at least 1")
    if heads is not None and base:
        raise UsageError("the base says how many heads there are", hint="leave out --heads")
    if alpha is not None and not 0 < abs(alpha) < float("inf"):
        raise UsageError(f"an alpha of {alpha:g} is no scale")


def read_ours(checkpoint: Checkpoint) -> Adapter:
    """An adapter in peft's format; raises as `read_adapter`, and for deltas and the adapters of other programs."""
    refuse_delta(checkpoint, "the adapter")
    others = _others(checkpoint)
    if others:
        raise IncompatibleInputs(
            f"{escape(checkpoint.name)}: is an adapter by the names of {' and '.join(sorted(others))}, expected peft's",
            hint=f"weightops adapter convert {escape(checkpoint.name)} --to peft",
        )
    return read_adapter(checkpoint)


def _others(checkpoint: Checkpoint) -> set[Program]:
    """The programs other than peft whose names there are."""
    return {program for program, ends in _ENDS.items() for name in checkpoint if name.endswith(ends)}


def program_of(checkpoint: Checkpoint) -> Program:
    """Whose an adapter is, by its names; raises `IncompatibleInputs` for those of no program, or of several."""
    found = _others(checkpoint)
    if any(".lora_A." in name or ".lora_embedding_A" in name for name in checkpoint):
        found.add("peft")
    if not found and not settings_of(checkpoint):
        name = next(iter(checkpoint), "nothing")
        raise IncompatibleInputs(
            f"{escape(checkpoint.name)}: holds {escape(name)}, and no factors of a LoRA adapter by the names of peft, "
            "torchtune, LitGPT, mlx-lm or sd-scripts",
            hint="is this a model?",
        )
    if len(found) > 1:
        raise IncompatibleInputs(f"{escape(checkpoint.name)}: holds names of {' and '.join(sorted(found))} at once")
    return found.pop() if found else "peft"


def _written(
    to: Program,
    modules: list[LoraModule],
    base: Base,
    adapter: Checkpoint,
    own: Adapter | None,
    carried: Carried,
    heads: int | None,
) -> Stored:
    settings = settings_of(adapter)
    named = base.name or settings.get("base_model_name_or_path") or settings.get("model")
    match to:
        case "torchtune":
            return torchtune.write(modules, base, heads)
        case "lit":
            return lit.write(modules, base)
        case "mlx":
            return mlx.write(modules, named)
        case "kohya":
            return kohya.write(modules, base)
    tensors = {name: tensor for module in modules for name, tensor in lora_tensors(module).items()}
    config = lora_config(
        modules,
        [settings] if own is not None else (),
        task_type=settings.get("task_type"),
        base_model_name_or_path=named,
        fan_in_fan_out=own is not None and own.config.fan_in_fan_out,
        **({"use_dora": True} if own is not None and own.config.use_dora else {}),
        **carried.settings,
    )
    return Stored({**tensors, **carried.tensors}, {CONFIG_NAME: written_json(config)}, notes=tuple(carried.notes))
