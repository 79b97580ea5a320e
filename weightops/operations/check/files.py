"""What check says of names and of the files beside the weights: leftovers, tokenizers, special tokens, stray files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.formats.adapter.files import is_adapter
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.names import is_derived
from weightops.layouts.restored import ROTARY_SUFFIX
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.read import read_tokenizer
from weightops.operations.check.report import Finding, Severity
from weightops.spec import DType

ReadFile = Callable[[str], bytes | None]
"""Gives a file beside the weights, None if there is none of that name."""

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")
_TRAINING = re.compile(r"(^|[._])(exp_avg(_sq)?|momentum_buffer|grad_norm)$|^(optimizer|optim|scheduler|ema)\.")
_LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|original_module)(\.|$)|lora_E$")
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight_format|absmax|quant_map|quant_state\..*|nested_absmax|nested_quant_map"
    r"|weight_scale|weight_scale_inv|weight_zero_point|weight_packed|input_scale)$|_(blocks|scales)$|\.scales$"
)
_PACKED = (DType.U8, DType.I8, DType.I32, DType.F8_E4M3, DType.F8_E5M2, DType.F4)
_TRAINING_FILES = re.compile(
    r"(optimizer|scheduler|scaler|training_args)\.(pt|bin)|rng_state.*\.pth|trainer_state\.json|global_step\d+|latest"
    r"|zero_to_fp32\.py|.*_optim_states\.pt"
)
_ABSURD = 1 << 40
_OPENING: tuple[tuple[str, str, Severity], ...] = (
    ("total_size is", "index", "warning"),
    ("holds weights but is not part", "file", "warning"),
    ("a Git LFS pointer", "file", "error"),
    ("code, carried along", "file", "note"),
    (": offline: ", "file", "note"),
    (": not in the cache, so left out: ", "file", "note"),
)


def is_wrapped(name: str) -> bool:
    """Whether a wrapper (DDP, FSDP, torch.compile) has put its name into that of a tensor."""
    return _WRAPPERS.search(name) is not None


def opening_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whatever opening the checkpoint warned of."""
    for warning in checkpoint.warnings:
        known = ((code, severity) for part, code, severity in _OPENING if part in warning)
        code, severity = next(known, ("file", "warning"))
        yield Finding(severity, code, warning.partition(": ")[0].split(" ")[0], warning)


def file_findings(names: Iterable[str]) -> Iterator[Finding]:
    """Files of a training run among those of the model."""
    found = [name for name in names if _TRAINING_FILES.fullmatch(name)]
    if found:
        text = f"{len(found)} files of a training run lie beside the weights: {listed(found)}"
        yield Finding("note", "file", found[0], text, "nobody who runs the model needs them")


def leftover_findings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Tensors whose names say that they are no parameters of a model, one finding for each kind of them."""

    def group(names: list[str], severity: Severity, code: str, what: str, hint: str) -> Iterator[Finding]:
        if names:
            count = f"{len(names)} tensor" + "s" * (len(names) != 1)
            yield Finding(severity, code, names[0], f"{count} {what}: {listed(names)}", hint)

    names = list(checkpoint)
    rotary = [n for n in names if is_derived(n.rpartition("/")[2]) or n.endswith(ROTARY_SUFFIX)]
    yield from group(rotary, "note", "leftover", "of rotary frequencies, computed anew from config.json", "")
    wrapped = [n for n in names if is_wrapped(n)]
    yield from group(
        wrapped, "error", "leftover", "named by a wrapper (DDP, FSDP, torch.compile)", "save the model inside it"
    )
    training = [n for n in names if _TRAINING.search(n)]
    yield from group(training, "warning", "leftover", "of an optimiser or training run, not of the model", "drop them")
    lora = [n for n in names if _LORA.search(n)]
    if len(lora) < len(names) and not is_adapter(checkpoint):
        yield from group(
            lora, "error", "lora", "of a LoRA among those of a model", "merge the adapter, or store it apart"
        )
    quantised = [n for n in names if QUANTISED.search(n)]
    stated = config.get("quantization_config") or "quantize_config.json" in checkpoint.sidecars
    if not stated:
        hint = "without quantization_config in config.json no library knows how to read them"
        yield from group(quantised, "error", "leftover", "of a quantised model", hint)
    elif not quantised and not any(t.spec.dtype in _PACKED or t.spec.dtype.is_packed for t in checkpoint.values()):
        text = "config.json has a quantization_config, and no tensor looks quantised"
        yield Finding("warning", "leftover", "config.json", text, "was the model merged or converted since?")


def tokens_without_rows(read_file: ReadFile, rows: int) -> Iterator[Finding]:
    """Tokenizer files with more tokens than an embedding has rows: the first such token ends a run of the model."""
    return _tokens_without_rows(_token_counts(read_file, "the tokenizer")[0], rows)


def _tokens_without_rows(counts: Mapping[str, int], rows: int) -> Iterator[Finding]:
    for name, count in counts.items():
        if count > rows:
            text = f"{name} has ids up to {count - 1}, the embedding has {rows} rows"
            yield Finding("error", "tokenizer", name, text, "are tokenizer and weights of one model?")


def _token_counts(read_file: ReadFile, where: str) -> tuple[dict[str, int], list[Finding]]:
    """One more than the highest id in each tokenizer file, and what cannot be said of others."""
    counts: dict[str, int] = {}
    problems: list[Finding] = []
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "added_tokens.json", "tokenizer_config.json"):
        try:
            data = read_file(name)
            count = None if data is None else _count_tokens(name, data, where)
        except UsageError as error:
            problems.append(Finding("note", "tokenizer", name, f"{error}: not held against the embedding"))
        except CorruptInput as error:
            problems.append(Finding("error", "tokenizer", name, str(error), error.hint or ""))
        else:
            if count:
                counts[name] = count
    return counts, problems


def token_findings(
    checkpoint: Checkpoint, config: Mapping[str, Any], read_file: ReadFile, rows: int | None
) -> Iterator[Finding]:
    """Tokenizer files and special tokens against the rows of the embedding, None if that is not known."""
    counts, problems = _token_counts(read_file, escape(checkpoint.name))
    yield from problems
    documents: dict[str, Mapping[str, Any]] = {"config.json": config}
    try:
        data = read_file("generation_config.json")
        documents["generation_config.json"] = (
            {} if data is None else strict_json.load_object(data, "generation_config.json")
        )
    except CorruptInput as error:
        yield Finding("error", "config", "generation_config.json", str(error))
    if rows is None:
        return
    yield from _tokens_without_rows(counts, rows)
    if counts and max(counts.values()) < rows:
        name, count = max(counts.items(), key=lambda item: item[1])
        text = f"the embedding has {rows} rows, {name} has {count} tokens: {rows - count} rows are padding"
        yield Finding("note", "padding", name, text)
    for name, document in documents.items():
        yield from _special_findings(name, document, rows)


def _special_findings(name: str, document: Mapping[str, Any], rows: int) -> Iterator[Finding]:
    """Ids of special tokens that have no row; below zero stands for none in files of 2023."""
    for key, value in document.items():
        if not key.endswith("_token_id"):
            continue
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and not 0 <= number < rows:
                text = (
                    f"{name}: {escape(key)} is {str(number)[:80]}, expected 0 to {rows - 1}, as the embedding has rows"
                )
                hint = "" if number < 0 else "loading or generating fails with it"
                yield Finding("note" if number < 0 else "error", "token-id", name, text, hint)


def _count_tokens(name: str, data: bytes, where: str) -> int | None:
    """One more than the highest id in a tokenizer's file; None where a file has none. Raises `CorruptInput`."""
    if name == "tokenizer.model":
        # Where a text ends does not matter here, so any answer to whether it is an instruct model will do.
        tokenizer = read_tokenizer(TokenizerFiles({name: data}, where), generation="3.1", instruct=True)
        return len(tokenizer.tokens) if tokenizer else None
    document = strict_json.load_object(data, f"{where}/{name}")
    if name == "tokenizer_config.json":
        decoder = document.get("added_tokens_decoder")
        ids: Iterable[Any] = (
            (int(n) for n in decoder if n.isdecimal() and len(n) < 20) if isinstance(decoder, dict) else ()
        )
    elif name == "tokenizer.json":
        model, added = document.get("model"), document.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict | list):
            raise CorruptInput(f"{where}/{name}: has no model.vocab")
        base = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        extra = (token.get("id") for token in added if isinstance(token, dict)) if isinstance(added, list) else ()
        ids = (*base, *extra)
    else:
        ids = document.values()
    numbers = [number for number in ids if type(number) is int]
    if numbers and max(numbers) >= _ABSURD:
        raise CorruptInput(f"{where}/{name}: an id has {len(str(max(numbers)))} digits")
    return max(numbers) + 1 if numbers else None
