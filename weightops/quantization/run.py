"""A quantise run from a checkpoint to a checkpoint: what is refused first, what it will take, and what comes out."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch

from weightops.checkpoint import Checkpoint, written_json
from weightops.engine.control import Control
from weightops.engine.finished import PLAN, SOURCES, lasting
from weightops.engine.proof import hold
from weightops.engine.sample import sample
from weightops.engine.work_folder import WorkFolder
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.quantized.containers import Container
from weightops.formats.quantized.gptq import (
    CONFIG_KEY,
    PARTS,
    CheckpointFormat,
    QuantizeConfig,
    prefixes,
    with_config,
)
from weightops.formats.quantized.table import find_weights
from weightops.inference.linears import left_as_they_are
from weightops.inference.model import BlockModel, max_positions
from weightops.io.digests import hash_bytes
from weightops.io.escape import escape
from weightops.io.platform.machine import available_memory
from weightops.io.strict_json import as_json
from weightops.layouts.skeleton import read_config
from weightops.lazy import LazyTensor, read_each
from weightops.operations.repack import repacked
from weightops.plan import digest_of, identity_of
from weightops.quantization import report
from weightops.quantization.calibration import Calibration
from weightops.quantization.driver import find_modules, quantize_blocks
from weightops.quantization.options import ModuleReport, Options
from weightops.quantization.work import BlocksRun, Work, check_room
from weightops.spec import DType
from weightops.stores.reader import FileReader
from weightops.version import library_versions

DEFAULT_SEQ_LEN = 2048
_GLOB = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)
"""The parts of a glob: a set of characters, or any other character."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take: layers, bytes of their packed tensors, of hidden states, and of memory.

    `kept_nbytes` is memory that would be used beside that, if there is room, to run blocks less often.
    """

    n_modules: int
    n_blocks: int
    packed_nbytes: int
    hidden_nbytes: int
    memory_nbytes: int
    kept_nbytes: int


@dataclass(frozen=True)
class Quantized:
    """A quantised checkpoint, not yet written, what became of each layer, and where its packed tensors lie."""

    checkpoint: Checkpoint
    modules: tuple[ModuleReport, ...]
    bits_per_weight: float
    work_folder: WorkFolder


@dataclass(frozen=True)
class Run:
    """All that is known before work starts."""

    source: Checkpoint
    model: BlockModel
    modules: Sequence[Sequence[str]]
    options: Options
    calibration: Calibration | None
    warnings: tuple[str, ...] = ()

    def estimate(self) -> Estimate:
        """What it will take."""
        bits, size = self.options.settings.bits, self.options.settings.group_size
        packed = widest = largest = outputs = 0
        for block, names in zip(self.model.blocks, self.modules, strict=True):
            module = self.model.module.get_submodule(block)
            largest = max(largest, sum(p.numel() for p in module.parameters()) * 4)
            shapes = [module.get_parameter(f"{name}.weight").shape for name in names]
            outputs = max(outputs, sum(n for n, _ in shapes))
            for n, k in shapes:
                groups = 1 if size < 0 else k // size
                packed += (k * n + groups * n) * bits // 8 + groups * n * 2 + k * 4
                widest = max(widest, k)
        tokens = self.calibration.tokens.numel() if self.calibration else 0
        memory = largest + 3 * widest * widest * 4 + (1 << 30)
        hidden = tokens * self.model.hidden_size * 4
        return Estimate(
            n_modules=sum(map(len, self.modules)),
            n_blocks=len(self.model.blocks),
            packed_nbytes=packed,
            hidden_nbytes=hidden,
            memory_nbytes=memory,
            kept_nbytes=tokens * outputs * 4,
        )

    def identity(self) -> BlocksRun:
        """What tells this run from another."""
        return identity(self.source, self.options, self.calibration)

    def marks(self, files: Mapping[str, Any]) -> dict[str, str]:
        """What the manifest of the output says of how it was made, with what was said of its files."""
        return marks(self.identity(), self.source, files)


def identity(source: Checkpoint, options: Options | None, calibration: Calibration | None) -> BlocksRun:
    """What tells a run from another: source, settings, data, and versions that could change bits."""
    tensors = json.dumps(identity_of({n: t.to_json() for n, t in source.items()}), sort_keys=True)
    with FileReader() as files:
        contents = sample(source.values(), files)
    return BlocksRun(
        source=hashlib.sha256(tensors.encode()).hexdigest(),
        contents=contents,
        options=options,
        calibration=calibration.digest if calibration else None,
        versions={n: v for n, v in library_versions().items() if n in ("weightops", "torch", "transformers")},
    )


def marks(run: BlocksRun, source: Checkpoint, files: Mapping[str, Any]) -> dict[str, str]:
    """What the manifest of the output says of how it was made, with what was said of its files.

    As of `weightops.engine.finished`: the plan of such an output is of files that are gone when it is there.
    """
    identity: dict[str, Any] = msgspec.to_builtins(run)
    tensors = {n: lasting(identity_of(t.to_json())) for n, t in source.items()}
    sidecars = {n: hash_bytes(source.sidecar(n) or b"", ["xxh3_128"]) for n in source.sidecars}
    said = {
        **identity,
        "source": tensors,
        "source contents": "",
        "sidecars": sidecars,
        "files": {name: value for name, value in files.items() if value},
    }
    return {PLAN: digest_of([said]), SOURCES: identity["source contents"]}


def _refuse_quantized(source: Checkpoint) -> None:
    refuse_delta(source, "the source")
    refuse_adapter(source, "the source")
    if CONFIG_KEY in source.config() or prefixes(source):
        raise IncompatibleInputs(
            f"{escape(source.name)} is quantised already",
            hint="quantise the original; or `weightops dequantize` it first, which does not bring back what was lost",
        )


def sample_length(source: Checkpoint, seq_len: int | None) -> int:
    """Tokens of a calibration window of a source that is to be quantised; raises what `prepare` does of it."""
    _refuse_quantized(source)
    return window_length(source, seq_len, DEFAULT_SEQ_LEN)


def window_length(source: Checkpoint, seq_len: int | None, default: int) -> int:
    """Tokens of a calibration window: `default` unless `seq_len` says otherwise, and at most the model's positions.

    Raises `UsageError` for a `seq_len` beyond them.
    """
    limit = max_positions(read_config(source))
    if seq_len is None:
        return min(default, limit or default)
    if limit is not None and seq_len > limit:
        raise UsageError(
            f"{escape(source.name)}: was made for {limit} tokens, one sample is to have {seq_len}",
            hint=f"give --seq-len {limit} or less",
        )
    return seq_len


def prepare(
    source: Checkpoint,
    options: Options,
    calibration: Calibration | None,
    *,
    device: str = "cpu",
    control: Control | None = None,
) -> Run:
    """Look at everything that can be known before work starts.

    Raises `IncompatibleInputs` for a source that is quantised already, `UsageError` for layers that do not fit or a
    method without data.
    """
    _refuse_quantized(source)
    if options.method == "gptq" and calibration is None:
        raise UsageError("GPTQ needs text to calibrate with", hint="give --calibration FILE, or --method rtn")
    model = BlockModel(source, dtype=compute_dtype(source, device), device=device, control=control)
    if calibration is not None:
        model.refuse_joined_blocks()
    modules = find_modules(model, options)
    # The model's checkpoint, in which experts that were stored in one tensor have one each.
    return Run(model.checkpoint, model, modules, options, calibration, tuple(_warnings(model, modules, calibration)))


def _warnings(model: BlockModel, modules: Sequence[Sequence[str]], calibration: Calibration | None) -> Iterator[str]:
    yield from left_as_they_are(model.module, model.blocks, model.shown)
    if calibration is None:
        return
    yield from calibration.warnings
    shapes = (
        model.module.get_parameter(f"{block}.{name}.weight").shape
        for block, names in zip(model.blocks, modules, strict=True)
        for name in names
    )
    tokens, widest = calibration.tokens.numel(), max(columns for _, columns in shapes)
    if tokens < widest:
        yield (
            f"{tokens} calibration tokens are fewer than the {widest} inputs of the widest layer: its Hessian is "
            "singular, and damping decides"
        )


def scale_dtype(source: Checkpoint, container: Container) -> Literal["float16", "bfloat16"]:
    """The type of scales: float16, or in compressed-tensors that of the model, which loaders give them."""
    if container != "compressed-tensors":
        return "float16"
    return "bfloat16" if _usual(source) is DType.BF16 else "float16"


def compute_dtype(source: Checkpoint, device: str) -> torch.dtype:
    """What blocks run in: float32 on a CPU; on a GPU the type of most of the weights, whose range activations have."""
    halves = {DType.F16: torch.float16, DType.BF16: torch.bfloat16}
    return torch.float32 if device == "cpu" else halves.get(_usual(source), torch.float32)


def _usual(source: Checkpoint) -> DType:
    """The type of most of the weights."""
    nbytes: Counter[DType] = Counter()
    for tensor in source.values():
        nbytes[tensor.spec.dtype] += tensor.nbytes
    return max(nbytes, key=nbytes.__getitem__)


@contextmanager
def quantized(
    run: Run, out: Path, control: Control, *, restart: bool = False, max_nbytes: int | None = None
) -> Iterator[Quantized]:
    """Quantise, continuing what an earlier run of the same began, and lend the result to be written.

    Memory that is left of `max_nbytes`, or of half of what is free, is used to run blocks less often.
    What lies beside the output, its `work_folder`, is the writer's to throw away when the output has its name.
    Raises `NoRoom`, `Locked`, `PlanDiffers`, or what `quantize_blocks` raises.
    """
    estimate = run.estimate()
    with Work(out, run.identity(), len(run.modules), restart=restart) as work:
        if work.n_done < len(run.modules):
            check_room(out, estimate.packed_nbytes, estimate.hidden_nbytes)
            tokens = run.calibration.tokens if run.calibration else torch.empty((0, 0), dtype=torch.int64)
            room = available_memory() // 2 if max_nbytes is None else max_nbytes
            spare = max(0, room - estimate.memory_nbytes)
            # What blocks are made of is kept by the next run, whatever is found to be wrong when all is written.
            hold(run.source.values(), control)
            quantize_blocks(run.model, run.modules, run.options, tokens, work, control, spare_nbytes=spare)
        yield _collect(run, work)


def _collect(run: Run, work: Work) -> Quantized:
    """The source with the packed tensors in the places of the weights they stand for."""
    packed: dict[str, LazyTensor] = {}
    reports: list[ModuleReport] = []
    names: dict[str, str] = {}
    for i, block in enumerate(run.model.blocks):
        tensors, found = work.read(i)
        packed |= tensors
        reports += msgspec.convert(found, list[ModuleReport])
        names |= run.model.tensor_names(block)
    modules = {names[f"{each.module}.weight"]: each.module for each in reports}
    tensors = {}
    shards = dict(run.source.shards)
    for name, tensor in run.source.items():
        module = modules.get(name)
        if module is None:
            tensors[name] = tensor
        else:
            own = name.removesuffix(".weight")
            parts = {f"{own}.{part}": packed[f"{module}.{part}"] for part in PARTS}
            tensors |= parts
            if name in shards:
                shards |= dict.fromkeys(parts, shards.pop(name))
    weights = sum(run.source[name].spec.numel for name in modules)
    made = _contained(run, _described(run, tensors, shards, reports))
    bits = 8 * sum(tensor.nbytes for name, tensor in made.items() if name not in run.source) / weights
    return Quantized(made, tuple(reports), bits, work.work_folder)


def _contained(run: Run, made: Checkpoint) -> Checkpoint:
    """The checkpoint in its container, for which only zero points and scales are looked at here."""
    options = run.options
    if options.checkpoint_format in get_args(CheckpointFormat):
        return made

    scales = DType(options.settings.scale_dtype) if options.checkpoint_format == "compressed-tensors" else None
    return repacked(made, find_weights(made, read_each), options.checkpoint_format, read_each, scales)


def _described(
    run: Run, tensors: dict[str, LazyTensor], shards: dict[str, str], reports: Sequence[ModuleReport]
) -> Checkpoint:
    """The checkpoint with what loaders need to know: in config.json, and in quantize_config.json for older ones."""
    settings, options = run.options.settings, run.options
    config = QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        desc_act=settings.desc_act,
        sym=settings.sym,
        checkpoint_format=options.kept_as,
        damp_percent=settings.damp_percent,
        static_groups=settings.static_groups,
        meta={"quantizer": [f"weightops:{library_versions()['weightops']}"]},
        dynamic={f"-:{_pattern(glob)}": {} for glob in options.skip} or None,
    )
    own = replace(
        run.source,
        tensors=tensors,
        shards=shards,
        total_size=None,
        content_id=None,
        digests={n: d for n, d in run.source.digests.items() if n in tensors},
        warnings=(*run.source.warnings, *run.warnings),
        folder=None,
    )
    told = as_json(report.QuantizeReport(modules=tuple(reports), options=options))
    return with_config(replace(own, sidecars={**own.sidecars, report.NAME: written_json(told)}), config)


def _pattern(glob: str) -> str:
    """A glob as a regular expression, which is what GPTQModel has in `dynamic`; it matches what `fnmatchcase` does."""
    return "^" + "".join(_part(part) for part in _GLOB.findall(glob)) + "$"


def _part(part: str) -> str:
    if part in ("*", "?"):
        return ".*" if part == "*" else "."
    if len(part) == 1:
        return re.escape(part)
    # Between `(?s:` and `)\\Z`.
    return fnmatch.translate(part)[4:-3]
