"""What check says of names, shapes and dtypes against config.json, as far as the architecture is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.engine.examine import TensorReport
from weightops.errors import UsageError
from weightops.formats.modules import NUMBERED
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import embedding_and_head, is_vocabulary
from weightops.layouts.families import PLAIN, why_unknown
from weightops.layouts.names import EMBEDDING, HEAD, LAYER, NORM, PROJECTIONS, is_derived
from weightops.layouts.restored import ROTARY_SUFFIX
from weightops.layouts.rope import rope_problems
from weightops.operations.check.layers import Layers, layer_count_findings, layer_findings, layers_of
from weightops.operations.check.report import Finding, Severity
from weightops.spec import DType, parse_dtype

_UNTIED_BY_DEFAULT = ("llama", "mistral")
_OWN_HEAD_DIM = ("gemma", "gemma2")
"""Those whose head_dim, where it is left out, is not hidden_size over heads."""
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("q", "hidden"),
    "k_proj": ("kv", "hidden"),
    "v_proj": ("kv", "hidden"),
    "o_proj": ("hidden", "q"),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
}
"""Out x in, as torch.nn.Linear has it; norms are `hidden` long."""
_ORIGINS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "q": "num_attention_heads * head_dim",
    "kv": "num_key_value_heads * head_dim",
}


def config_findings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Names, shapes and dtypes against config.json, as far as that and the architecture are understood here."""
    family, layers = config.get("model_type"), layers_of(checkpoint)
    why = why_unknown(checkpoint, config)
    severity: Severity = "warning" if why else "error"
    if why:
        text = f"{escape(checkpoint.name)}: {why}: layers are held against one another, and not against a known model"
        yield Finding("note", "unchecked", "config.json", text)
    invalid = [] if why else list(_invalid(config))
    yield from invalid
    is_plain, is_known = family in PLAIN and not why, not why and not invalid
    yield from layer_findings(
        layers, severity, tensors=not is_plain, shapes=lambda n: not is_known or not _dimensions(n)
    )
    if is_plain:
        yield from _membership(checkpoint, layers, config)
    if not config:
        return
    yield from dtype_findings(checkpoint, config)
    if "text_config" in config:
        return
    yield from layer_count_findings(layers, config, severity)
    if is_known:
        yield from _shape_findings(checkpoint, config)
    elif why:
        yield from _embedding_findings(checkpoint, config)


def rope_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Rotary settings with which the model does not load, or computes something else than is meant."""
    for problem in rope_problems(config):
        yield Finding(problem.severity, "config", "config.json", problem.message, problem.hint)


def dtype_findings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """The dtype in config.json against that of most bytes; and whether there is more than one."""
    nbytes: Counter[DType] = Counter()
    for name, tensor in checkpoint.items():
        if tensor.spec.dtype.is_float and tensor.spec.dtype.bits >= 16 and not name.endswith(ROTARY_SUFFIX):
            nbytes[tensor.spec.dtype] += tensor.nbytes
    if not nbytes:
        return
    (most, _), *others = nbytes.most_common()
    if others:
        minority = {dtype for dtype, _ in others}
        names = [name for name, tensor in checkpoint.items() if tensor.spec.dtype in minority]
        kinds = ", ".join(sorted(dtype.value for dtype in minority))
        text = f"most weights are {most.value}, {len(names)} tensors are {kinds}: {listed(names)}"
        yield Finding("note", "mixed-dtype", names[0], text)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    stated = config.get(key)
    try:
        dtype = parse_dtype(stated) if isinstance(stated, str) else None
    except UsageError:
        yield Finding("warning", "config", "config.json", f"config.json: {key} is {escape(str(stated))[:80]}, no dtype")
        return
    if dtype is not None and dtype is not most:
        text = f"config.json: {key} is {dtype.value}, most weights are {most.value}"
        yield Finding("warning", "config-dtype", "config.json", text, "loading casts them to what config.json says")


def _embedding_findings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """The embeddings of an architecture that is not known, by what all call vocabulary and width."""
    vocabulary = config.get("vocab_size")
    width = next((config[key] for key in _WIDTHS if type(config.get(key)) is int), None)
    for name, tensor in checkpoint.items():
        if not is_vocabulary(name) or len(tensor.spec.shape) != 2 or not tensor.spec.dtype.is_float:
            continue
        expected = [vocabulary if type(vocabulary) is int else None, width]
        pairs = zip(tensor.spec.shape, expected, strict=True)
        if any(wanted is not None and size != wanted for size, wanted in pairs):
            says = " x ".join("?" if n is None else str(n)[:80] for n in expected)
            text = f"{escape(name)} is {list(tensor.spec.shape)}, config.json says {says}"
            yield Finding("warning", "config-shape", name, text)


def _invalid(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Counts in config.json that are none, or do not go together."""
    numbers = {}
    for key in _COUNTS:
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            text = f"config.json: {key} is {escape(repr(value))[:80]}, expected a whole number above zero"
            yield Finding("error", "config", "config.json", text)
        else:
            numbers[key] = value
    heads, kv, hidden = (numbers.get(k) for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and kv and heads % kv:
        text = f"config.json: {heads} attention heads are no multiple of {kv} heads of k and v"
        yield Finding("error", "config", "config.json", text)
    own = config.get("model_type") in _OWN_HEAD_DIM or "head_dim" in numbers
    if heads and hidden and not own and hidden % heads:
        text = f"config.json: hidden_size {hidden} is no multiple of {heads} heads, and there is no head_dim"
        yield Finding("error", "config", "config.json", text)


def _shape_findings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Shapes that are not what config.json says, once for all layers that have the same wrong one."""
    sizes = _sizes(config)
    wrong: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, tensor in checkpoint.items():
        dimensions = _dimensions(name)
        if dimensions is None:
            continue
        shape = tensor.spec.shape
        fits = len(shape) == len(dimensions) and all(
            sizes[d] in (None, size) for d, size in zip(dimensions, shape, strict=True)
        )
        if not fits:
            wrong.setdefault((NUMBERED.sub(r"\1.*.\3", name), shape), []).append(name)
    for (_, shape), names in wrong.items():
        dimensions = _dimensions(names[0]) or ()
        says = [str(sizes[d] or "?")[:80] for d in dimensions]
        origin = ", ".join(_ORIGINS[d] for d in dimensions)
        more = f", and so are {len(names) - 1} more of its kind" if len(names) > 1 else ""
        text = f"{escape(names[0])} is {list(shape)}, config.json says [{', '.join(says)}] ({origin}){more}"
        yield Finding("error", "config-shape", names[0], text, "are config.json and the weights of one model?")


def _dimensions(name: str) -> tuple[str, ...] | None:
    """The dimensions of a tensor with one of LLaMA's names, None for any other."""
    stem, _, kind = name.rpartition(".")
    matched = NUMBERED.fullmatch(name)
    role = next((r for r in LAYER if matched and r.name("hf", int(matched[2]), kind) == name), None)
    if role is None:
        role = next((r for r in (EMBEDDING, NORM, HEAD) if r.name("hf", 0, kind) == name), None)
    if role is None or kind not in ("weight", "bias"):
        return None
    dimensions = _DIMENSIONS.get(stem.rpartition(".")[2], ("hidden",))
    return dimensions[:1] if kind == "bias" else dimensions


def _sizes(config: Mapping[str, Any]) -> dict[str, int | None]:
    """The sizes of dimensions, None where config.json leaves them open."""
    vocabulary, hidden, ffn, heads, kv, width = (config.get(key) for key in _COUNTS)
    if width is None and hidden and heads and config.get("model_type") not in _OWN_HEAD_DIM:
        width = hidden // heads
    kv = heads if kv is None else kv
    q_rows, kv_rows = (n * width if n and width else None for n in (heads, kv))
    return {"vocab": vocabulary, "hidden": hidden, "ffn": ffn, "q": q_rows, "kv": kv_rows}


def _membership(checkpoint: Checkpoint, layers: Layers, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Tensors of a plain LLaMA or Mistral that are not there, and others that are."""
    numbers = sorted(layers.get("model.layers", {}))
    expected = [role.name("hf", n) for n in numbers for role in LAYER] + [r.name("hf", 0) for r in (EMBEDDING, NORM)]
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        text = f"{len(missing)} tensors of a {config['model_type']} model are missing: {listed(missing)}"
        yield Finding("error", "missing", missing[0], text, "is a file of the model missing?")
    known = {*expected, HEAD.name("hf", 0), *(role.name("hf", n, "bias") for n in numbers for role in PROJECTIONS)}
    unexpected = [name for name in checkpoint if name not in known and not is_derived(name)]
    if unexpected:
        text = f"{len(unexpected)} tensors are no part of a {config['model_type']} model: {listed(unexpected)}"
        yield Finding("warning", "unexpected", unexpected[0], text, "transformers leaves them out")


def tie_findings(
    checkpoint: Checkpoint, config: Mapping[str, Any], tensors: Mapping[str, TensorReport], *, missing: bool
) -> Iterator[Finding]:
    """Input and output embedding against what config.json says: whether there should be one or two of them.

    That one is missing is said only if it is to be, for whoever knows the architecture says so anyway.
    """
    embedding, head = embedding_and_head(checkpoint)
    if embedding is None or not config:
        return
    tied = config.get("tie_word_embeddings")
    architectures = config.get("architectures")
    is_base = isinstance(architectures, list) and not any(str(a).endswith("ForCausalLM") for a in architectures)
    if head is None:
        untied = tied is False or (tied is None and config.get("model_type") in _UNTIED_BY_DEFAULT)
        if missing and untied and not is_base:
            text = f"{HEAD.name('hf', 0)} is missing, and config.json does not tie it to {embedding}"
            hint = "loading makes a random one; set tie_word_embeddings if they are tied"
            yield Finding("error", "tie", HEAD.name("hf", 0), text, hint)
        return
    one, other = checkpoint[embedding], checkpoint[head]
    digests = [tensors[name].xxh3_128 if name in tensors else None for name in (embedding, head)]
    same = one == other or (one.spec == other.spec and digests[0] is not None and digests[0] == digests[1])
    unknown = one.spec == other.spec and None in digests and not same
    if tied is True and not same and not unknown:
        text = f"config.json ties {head} to {embedding}, and they differ"
        yield Finding(
            "error", "tie", head, text, "loading leaves one of them out; unset tie_word_embeddings to keep both"
        )
    elif same and one != other:
        says = "ties them" if tied is True else "does not tie them" if tied is False else "does not say"
        text = f"{embedding} and {head} hold the same, stored twice; config.json {says}"
        yield Finding("note", "tie", head, text)
