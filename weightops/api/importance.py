"""The Python API of importance matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from weightops.api.models import opened
from weightops.api.worked import Worked
from weightops.engine.control import Control
from weightops.engine.finished import PLAN, SOURCES, find_marked
from weightops.engine.proof import hold
from weightops.errors import UsageError
from weightops.formats.choose import SINGLE_SUFFIXES
from weightops.io.digests import hash_file
from weightops.io.escape import escape
from weightops.plan import sources_of
from weightops.recipes.execute import Result, Running, RunningHere, may_skip, write_all
from weightops.recipes.planning import StrPath, Wanted, several

if TYPE_CHECKING:
    from weightops.engine.work_folder import WorkFolder
    from weightops.quantization.importance import Sums

_CHUNK = 512
"""Tokens that llama-imatrix takes at once."""


def imatrix(
    source: StrPath,
    out: StrPath,
    *,
    calibration: StrPath | Sequence[StrPath] = (),
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    **running: Unpack[RunningHere],
) -> Result:
    """Measure the inputs of a model's linear layers on some text, for `convert` and llama-quantize.

    `out` is a file: `.gguf`, or `.dat`, which older programs read. `calibration`: text or JSONL files, of which
    `samples` windows of `seq_len` tokens are drawn with `seed`: 512 tokens, or as many as the model has positions.
    `device`: where to compute; `auto` is a GPU if there is one. The same call continues at its block what an earlier
    one began. Raises `UsageError` for models of a family that GGUF files are not written of.
    """
    from weightops.inference.model import BlockModel, pick_device
    from weightops.inference.tokens import check_tokens, load_tokenizer
    from weightops.quantization.calibration import begun, calibrate, read_documents
    from weightops.quantization.importance import collect, expected, find_layers, matrix_of, measured
    from weightops.quantization.run import compute_dtype, identity, marks, window_length
    from weightops.quantization.work import Work, check_room

    worked = Worked.at(out, is_file=True)
    out = worked.here
    if out.suffix not in SINGLE_SUFFIXES:
        raise UsageError(
            f"{escape(str(out))}: an importance matrix is a file",
            hint="name it NAME.gguf, or NAME.dat for older programs",
        )
    control = running.get("control") or Control()
    running["control"] = control
    is_skipping, may = may_skip(running), running.get("overwrite", False)
    with control.stores.connected():
        checkpoint = opened(source, control)
        if not running.get("dry_run"):
            worked.refuse(sources_of(checkpoint.values()), control.stores, may_replace=may or is_skipping)
        length, texts = window_length(checkpoint, seq_len, _CHUNK), [Path(text) for text in several(calibration)]
        tokenizer, where = load_tokenizer(checkpoint), pick_device(device)
        data = begun(calibrate(tokenizer, read_documents(texts), samples, length, seed), tokenizer)
        model = BlockModel(checkpoint, dtype=compute_dtype(checkpoint, where), device=where, control=control)
        model.refuse_joined_blocks()
        layers = find_layers(model, checkpoint.config())
        check_tokens(data.tokens.flatten(), tokenizer, model.vocab_size, model.shown)
        run = identity(checkpoint, None, data)
        provenance = marks(run, checkpoint, {"name": out.name})
        recipe = _recipe(texts, samples=len(data.tokens), seq_len=length, seed=seed)
        said = (*checkpoint.warnings, *data.warnings, *layers.warnings)

        def write(sums: Sums, running: RunningHere, beside: WorkFolder | None = None) -> Result:
            datasets, shape = [path.name for path in texts], (len(data.tokens), length)
            made = matrix_of(sums, out.stem, datasets, shape, is_old=out.suffix == ".dat")
            # What was run is read once more, to know the source by its content, and to hold it against its manifest.
            made = replace(made, watch=tuple(checkpoint.values()), warnings=(*said, *made.warnings))
            wanted = Wanted(made, {}, recipe, {"source": checkpoint}, beside=beside, provenance=provenance)
            return write_all({worked.out: wanted}, cast("Running", running))[worked.out]

        if is_skipping:
            there = worked.lying(control.stores)
            found = find_marked(there, provenance[PLAN], lambda: provenance[SOURCES], may_differ=may)
            if found is not None:
                planned = write(expected(layers), {"dry_run": True, "control": control})
                return replace(planned, manifest=found, skipped=True)
        if running.get("dry_run"):
            return write(expected(layers), {"dry_run": True, "control": control})
        with Work(out, run, len(layers.matrices), restart=running.get("restart", False)) as work:
            if work.n_done < len(layers.matrices):
                check_room(out, 0, data.tokens.numel() * model.hidden_size * 4)
                hold(checkpoint.values(), control)
                collect(layers, data.tokens, work, control)
            return write(measured(work), running, work.work_folder)


def _recipe(texts: Sequence[Path], **said: int) -> dict[str, Any]:
    """How it was made, as a manifest records it: calibration files by their digests, not by their places."""
    files = [{"name": path.name, **hash_file(path, ["sha256"]).digests} for path in texts]
    step = {"source": "source", "calibration": files, **said}
    return {"tensors": {"importance": {"imatrix": step}}, "output": {"from": "importance"}}
