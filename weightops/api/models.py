"""The Python API of what runs models: quantising with calibration data, evaluating, generating."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import msgspec

from weightops.api.outputs import OutputHere, split_output
from weightops.api.worked import Worked
from weightops.checkpoint import Checkpoint, Copied
from weightops.engine.control import Control
from weightops.engine.finished import PLAN, SOURCES, find_marked
from weightops.errors import UsageError
from weightops.formats.folder import open_checkpoint
from weightops.formats.places import is_remote
from weightops.formats.sidecars import Kind, kind_of
from weightops.inference.asked import Asked, settings_of
from weightops.io.atomic import check_target, write_whole
from weightops.io.brief import brief
from weightops.io.digests import hash_file
from weightops.io.strict_json import as_json, dumps
from weightops.plan import parse_size, sources_of
from weightops.recipes.execute import Result, may_skip, write_all
from weightops.recipes.planning import StrPath, Wanted, several

if TYPE_CHECKING:
    from weightops.inference.evaluate import Evaluation
    from weightops.inference.generate import Generation
    from weightops.inference.packed import Engine
    from weightops.quantization.calibration import Calibration
    from weightops.quantization.options import ModuleReport, Options
    from weightops.quantization.run import Estimate

ComputeDType = Literal["float32", "bfloat16", "float16"]
"""What a model computes in."""
_BASE_NBYTES = 300 << 20
"""The interpreter with torch and transformers loaded."""
_DESCRIBING = (Kind.CONFIG, Kind.GENERATION, Kind.TOKENIZER, Kind.TEMPLATE)


@dataclass(frozen=True)
class Quantization:
    """What `quantize` did, or with `dry_run` would do: then there is no `result`.

    Nor is there one if `skipped`: what it would write was there already, and with `if_exists="skip"` was left alone.
    """

    estimate: Estimate
    result: Result | None = None
    modules: tuple[ModuleReport, ...] = ()
    bits_per_weight: float = 0.0
    skipped: bool = False

    __repr__ = brief

    def to_json(self, workers: int | None = None) -> dict[str, Any]:
        """A document of schema `weightops-quantize/1`."""
        from weightops.api.quantize_report import quantize_json

        return quantize_json(self.estimate, self.result, self.modules, self.bits_per_weight, workers, self.skipped)


def quantize(
    source: StrPath,
    out: StrPath,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: bool = False,
    static_groups: bool = False,
    method: Literal["gptq", "rtn"] = "gptq",
    calibration: StrPath | Sequence[StrPath] = (),
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    damp_percent: float = 0.01,
    mse: bool = True,
    skip: str | Sequence[str] = (),
    checkpoint_format: Literal["gptq", "gptq_v2", "awq", "compressed-tensors"] = "gptq",
    device: str = "auto",
    max_memory: str | int | None = None,
    **output: Unpack[OutputHere],
) -> Quantization:
    """Quantise the linear layers of a model's blocks; see `weightops.quantization.driver`.

    `calibration`: text or JSONL files, of which `samples` windows of `seq_len` tokens are drawn with `seed`: 2048
    tokens, or as many as the model has positions. `skip`: globs of layers that stay as they are. `device`: where to
    compute; `auto` is a GPU if there is one. Of `max_memory`, or half of what is free, what a block does not need saves
    time. `checkpoint_format` is what holds the integers. The same call continues at its block what an earlier one
    began; for an `out` in a bucket, what it needs for that lies in the current folder.
    """
    from weightops.inference.model import pick_device
    from weightops.inference.tokens import check_tokens, load_tokenizer
    from weightops.ops.gptq.solver import Settings
    from weightops.quantization.calibration import calibrate, read_documents
    from weightops.quantization.options import Options
    from weightops.quantization.run import prepare, quantized, sample_length, scale_dtype

    files, running = split_output(output, OutputHere)
    worked = Worked.at(out)
    control = running.get("control") or Control()
    running["control"] = control
    is_skipping = may_skip(running)
    with control.stores.connected():
        checkpoint = opened(source, control)
        if not running.get("dry_run"):
            may_replace = running.get("overwrite", False) or is_skipping
            worked.refuse(sources_of(checkpoint.values()), control.stores, may_replace=may_replace)
        settings = Settings(
            bits=bits,
            group_size=group_size,
            sym=sym,
            desc_act=act_order,
            static_groups=static_groups,
            damp_percent=damp_percent,
            mse=mse,
            v1=checkpoint_format == "gptq",
            scale_dtype=scale_dtype(checkpoint, checkpoint_format),
        )
        options = Options(settings, method, skip=several(skip), checkpoint_format=checkpoint_format)
        tokenizer = data = None
        texts = [Path(text) for text in several(calibration)]
        if method == "rtn" and (texts or act_order or static_groups):
            unused = "calibration" if texts else "act_order" if act_order else "static_groups"
            raise UsageError(f"{unused} has no use with method rtn, which looks at no text", hint="leave it out")
        if texts:
            length = sample_length(checkpoint, seq_len)
            tokenizer = load_tokenizer(checkpoint)
            data = calibrate(tokenizer, read_documents(texts), samples, length, seed)
        run = prepare(checkpoint, options, data, device=pick_device(device), control=control)
        if tokenizer is not None and data is not None:
            check_tokens(data.tokens.flatten(), tokenizer, run.model.vocab_size, run.model.shown)
        estimate = run.estimate()
        provenance = run.marks({name: value for name, value in files.items() if name != "expect"})
        if is_skipping:
            may, there = running.get("overwrite", False), worked.lying(control.stores)
            if find_marked(there, provenance[PLAN], lambda: provenance[SOURCES], may_differ=may):
                return Quantization(estimate, skipped=True)
        if running.get("dry_run"):
            return Quantization(estimate)
        max_nbytes = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
        with quantized(
            run, worked.here, control, restart=running.get("restart", False), max_nbytes=max_nbytes
        ) as found:
            recipe = _quantize_recipe(options, texts, data, seed)
            # What was quantised is read once more, to know the source by its content, and to hold it against its
            # manifest.
            kept = set(found.checkpoint.values())
            gone = tuple(tensor for tensor in checkpoint.values() if tensor not in kept)
            made = replace(found.checkpoint, watch=(*found.checkpoint.watch, *gone))
            sources, beside = {"source": checkpoint}, found.work_folder
            wanted = Wanted(made, files, recipe, sources, beside=beside, provenance=provenance)
            result = write_all({worked.out: wanted}, running)[worked.out]
    return Quantization(estimate, result, found.modules, found.bits_per_weight)


def _quantize_recipe(options: Options, texts: Sequence[Path], data: Calibration | None, seed: int) -> dict[str, Any]:
    """How a model is quantised, as a manifest records it: calibration files by their digests, not by their places."""
    step = {"source": "source", **msgspec.to_builtins(options.settings), **msgspec.to_builtins(options)}
    del step["settings"]
    if data is not None:
        samples, seq_len = data.tokens.shape
        files = [{"name": path.name, **hash_file(path, ["sha256"]).digests} for path in texts]
        step |= {"calibration": files, "samples": samples, "seq_len": seq_len, "seed": seed}
    return {"tensors": {"quantized": {"quantize": step}}, "output": {"from": "quantized"}}


def evaluate(
    source: StrPath | Checkpoint | Sequence[StrPath | Checkpoint],
    text: StrPath | Sequence[StrPath],
    *,
    seq_len: int | None = None,
    reference: StrPath | Checkpoint | None = None,
    dtype: ComputeDType = "float32",
    device: str = "auto",
    engine: Engine = "auto",
    max_memory: str | int | None = None,
    influence: bool = False,
    experts: StrPath | None = None,
    control: Control | None = None,
) -> Evaluation:
    """Perplexity of models on text files, and how far they are from a reference.

    Several files are joined by blank lines. A source may also be a checkpoint that an operation has derived and nobody
    has written. `influence` says also how much each layer changes; `experts` is a file to write how the experts of the
    one model are used, which `experts(keep=)` takes. See `weightops.inference.evaluate`.
    """
    import torch

    from weightops.inference.evaluate import evaluate as operation
    from weightops.inference.model import pick_device
    from weightops.inference.tokens import read_text

    given = [source] if isinstance(source, str | os.PathLike | Checkpoint) else source
    control = control or Control()
    if experts is not None:
        if len(given) != 1:
            hint = "measure one after the other, each with a file of its own"
            raise UsageError(f"--experts is a file about one model, and {len(given)} are given", hint=hint)
        check_target(Path(experts))
    with control.stores.connected():
        found = operation(
            [opened(each, control) for each in given],
            read_text(map(Path, several(text))),
            seq_len=seq_len,
            reference=opened(reference, control) if reference is not None else None,
            dtype=getattr(torch, dtype),
            device=pick_device(device),
            engine=engine,
            max_nbytes=for_models(max_memory),
            influence=influence,
            experts=experts is not None,
            control=control,
        )
    if experts is not None:
        use = found.scores[-1].experts
        assert use is not None
        write_whole(Path(experts), dumps(as_json(use)))
    return found


def generate(
    source: StrPath | Checkpoint,
    prompt: str,
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
) -> Generation:
    """Text that a model continues `prompt` with; iterate over it for its pieces, `"".join` them for the whole.

    At temperature 0 each token is the most probable one. With `chat`, `system` or `template` the prompt is what a user
    says, and the text an answer. A source `BASE+ADAPTER` is a model with a LoRA adapter merged into it as its weights
    are read. See `weightops.inference.generate`.
    """
    import torch

    from weightops.inference.generate import Generation
    from weightops.inference.model import pick_device
    from weightops.inference.prompts import conversation

    is_chat = chat or system is not None or template is not None
    control = control or Control()
    with control.stores.connected():
        return Generation(
            opened_merged(source, control),
            conversation(prompt, system=system, template=os.fspath(template or "own")) if is_chat else prompt,
            settings=settings_of(settings),
            dtype=getattr(torch, dtype),
            device=pick_device(device),
            engine=engine,
            max_nbytes=for_models(max_memory),
            control=control,
        )


def for_models(max_memory: str | int | None) -> int | None:
    """What models may take of the memory that the whole process may take; None where nobody has set a limit."""
    if max_memory is None:
        return None
    nbytes = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    return max(0, nbytes - _BASE_NBYTES)


def opened(source: StrPath | Checkpoint, control: Control) -> Checkpoint:
    """A checkpoint at a path, on a hub or server, or one that is opened already."""
    if isinstance(source, Checkpoint):
        return source
    return described(open_checkpoint(source, control.stores))


def described(checkpoint: Checkpoint) -> Checkpoint:
    """The same; a weight file by itself with what lies beside it, which says what it is."""
    if checkpoint.sidecars or checkpoint.folder is None:
        return checkpoint
    folder = checkpoint.folder
    beside = [name for name in folder.names() if kind_of(name) in _DESCRIBING and folder.has(name)]
    return replace(checkpoint, sidecars={name: Copied(folder.identity(name)) for name in beside})


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
