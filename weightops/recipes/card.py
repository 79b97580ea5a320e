"""Model cards: README.md of a folder, as Hugging Face's hub reads it.

Front matter: https://huggingface.co/docs/hub/model-cards#model-card-metadata. `base_model` takes the ids of
repositories on the hub, `base_model_relation` finetune, adapter, merge or quantized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightops.checkpoint import Digests, Document
from weightops.formats.proofs.manifest import Manifest, content_id
from weightops.io.escape import escape
from weightops.spec import TensorSpec

NAME = "README.md"
RELATIONS = ("finetune", "adapter", "merge", "quantized")
_PART = r"[A-Za-z0-9_][\w.-]{0,95}(?<![.-])"
_HUB_ID = re.compile(rf"(?!.*(--|\.\.))(?!.*\.git$){_PART}/{_PART}", re.ASCII)
_BASE_ROLES = {"recover": "raw", "diff": "raw", "merge-lora": "base", "extract-lora": "base"} | {
    "resize-adapter": "adapter",
    "convert-adapter": "adapter",
    "combine-adapters": "adapter",
}
"""The source of each operation that the result is a version of; of others it is `source`."""
_OF_ADAPTERS = ("resize-adapter", "convert-adapter", "combine-adapters")
"""Operations of which the sources are adapters: what these were trained on, no recipe says."""
_SPECIAL = re.compile(r"([\\`*\[\]<>#|~&]|(?<!\w)_|_(?!\w))")


class ModelCard(Document, frozen=True):
    """README.md, whose content id is known when all tensors are written; see `render_card`."""

    title: str
    base_models: tuple[str, ...]
    relation: str | None
    library: str | None
    steps: tuple[str, ...]
    files: dict[str, int]
    warnings: tuple[str, ...] = ()
    quantization: str = ""
    configurations: tuple[str, ...] = ()
    recovers_from: str | None = None

    @property
    def name(self) -> str:
        return NAME

    @property
    def is_listed(self) -> bool:
        return False

    def render(
        self,
        tensors: Mapping[str, tuple[TensorSpec, str]],
        witnesses: Digests,
        files: Mapping[str, Mapping[str, str]],
    ) -> bytes:
        return self.render_for("", tensors)

    def render_for(self, place: str, tensors: Mapping[str, tuple[TensorSpec, str]]) -> bytes:
        """The card of a model at a place, as in hf://org/name; see `render_card`."""
        return render_card(
            self.title,
            self.base_models,
            self.relation,
            self.library,
            self.steps,
            files=self.files,
            warnings=self.warnings,
            content_id=content_id(tensors),
            dtypes=_parameters(spec for spec, _ in tensors.values()),
            quantization=self.quantization,
            configurations=self.configurations,
            recovers_from=self.recovers_from,
            place=place,
        )


def card_of(manifest: Manifest, title: str, place: str) -> bytes:
    """The card of a folder by its manifest alone, to be published at a place, as in hf://org/name."""
    weights = {tensor.file for tensor in manifest.tensors.values()}
    made = card(
        title,
        manifest.recipe,
        {role: source.name for role, source in manifest.sources.items()},
        files={name: entry.nbytes for name, entry in manifest.files.items() if name in weights},
    )
    return made.render_for(place, {name: (tensor.spec, tensor.xxh3_128) for name, tensor in manifest.tensors.items()})


def card(
    title: str,
    recipe: Mapping[str, Any],
    sources: Mapping[str, str],
    *,
    files: Mapping[str, int],
    warnings: Sequence[str] = (),
    quantization: str = "",
) -> ModelCard:
    """The card of what a recipe makes.

    `recipe` is what the manifest has of it: `{"tensors": {name: {operation: {role: names, option: value}}}, "output":
    {"from": name, option: value}}`. `sources` are the names of checkpoints (`hf://org/name@commit`, or that of a
    folder) by those that the recipe has for them, `files` the bytes of the weight files by name.
    """
    steps, output = dict(recipe.get("tensors", {})), dict(recipe.get("output", {}))
    result = str(output.pop("from", ""))
    everything = {**steps, "": {"cast": {"source": result, **output}}} if output else steps
    path, base = _ancestry(everything, "" if output else result)
    relation = next((found for step in path for found in [_relation(*step)] if found), None)
    is_for_others = any(operation == "convert" and arguments.get("to") != "hf" for operation, arguments in path)
    is_delta = any(operation == "diff" for operation, _ in path)
    if path and path[-1][0] == "merge":
        relation = relation or "merge"
        bases = tuple(sources[name] for name in _behind(everything, path[-1][1]) if name in sources)
    else:
        is_known = base in sources and not is_delta and not (path and path[-1][0] in _OF_ADAPTERS)
        bases = (sources[base],) if is_known else ()
    is_adapter = relation == "adapter" or (path and path[0][0] in _OF_ADAPTERS)
    is_for_others |= any(
        operation == "convert-adapter" and arguments.get("to") != "peft" for operation, arguments in path
    )
    return ModelCard(
        title,
        bases,
        None if is_delta else relation,
        None if is_for_others or is_delta else "peft" if is_adapter else "transformers",
        tuple(_sentence(name, operation, arguments) for name, operation, arguments in _operations(everything)),
        dict(files),
        tuple(warnings),
        quantization,
        tuple(_configuration(arguments) for _, operation, arguments in _operations(everything) if operation == "merge"),
        sources.get(base, "ORIGINAL") if is_delta else None,
    )


def _behind(steps: Mapping[str, Mapping[str, Mapping[str, Any]]], arguments: Mapping[str, Any]) -> list[str]:
    """The sources that a merge is made of, each once; of a model with an adapter the model."""
    found: dict[str, None] = {}
    names = arguments["models"]
    for name in [names] if isinstance(names, str) else names:
        path, source = _ancestry(steps, name)
        if path and path[-1][0] == "merge":
            found |= dict.fromkeys(_behind(steps, path[-1][1]))
        else:
            found[source] = None
    return list(found)


def _configuration(arguments: Mapping[str, Any]) -> str:
    """The document of a merge in mergekit's language."""
    import yaml  # imported here because few runs write a card

    text: str = yaml.safe_dump(arguments["config"], sort_keys=False, allow_unicode=True)
    return text


def quantization_of(config: Mapping[str, Any]) -> str:
    """How a model is quantised, as its config.json says: `gptq, 4 bits, in groups of 128`; empty if it is not."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return ""
    method, bits, size = (found.get(key) for key in ("quant_method", "bits", "group_size"))
    words = [method if isinstance(method, str) else "quantised"]
    words += [f"{bits} bits"] if isinstance(bits, int) else []
    words += [f"in groups of {size}"] if isinstance(size, int) and size > 0 else []
    return ", ".join(words)


def _operations(steps: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    return ((name, operation, arguments) for name, step in steps.items() for operation, arguments in step.items())


def _ancestry(
    steps: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str
) -> tuple[list[tuple[str, Mapping[str, Any]]], str]:
    """The steps from a result back to the source that it is a version of, the last first, and that source."""
    path: list[tuple[str, Mapping[str, Any]]] = []
    while name in steps and len(path) < len(steps):
        ((operation, arguments),) = steps[name].items()
        path.append((operation, arguments))
        name = str(arguments.get(_BASE_ROLES.get(operation, "source")))
    return path, name


def _relation(operation: str, arguments: Mapping[str, Any]) -> str | None:
    """How a result relates to its base. The hub has no word for one of other names, files or precision."""
    if operation == "extract-lora":
        return "adapter"
    if operation in ("recover", "merge-lora"):
        return "finetune"
    if operation == "quantize":
        return "quantized"
    is_quantised = arguments.get("scheme") is not None or str(arguments.get("dtype", "")).startswith(("float8", "q"))
    return "quantized" if is_quantised else None


def _sentence(name: str, operation: str, arguments: Mapping[str, Any]) -> str:
    """One step as text: `name: operation role=name option=value`."""
    if operation == "merge":  # whose document has a place of its own
        own = {key: value for key, value in arguments.items() if key != "config"}
        arguments = {"method": arguments["config"].get("merge_method", ""), **own}
    said = " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in arguments.items()
    )
    return f"{name or 'output'}: {operation} {said}".rstrip()


def render_card(
    title: str,
    base_models: Sequence[str],
    relation: str | None,
    library: str | None,
    steps: Sequence[str],
    *,
    files: Mapping[str, int],
    warnings: Sequence[str] = (),
    content_id: str | None = None,
    dtypes: Mapping[str, int] | None = None,
    quantization: str = "",
    configurations: Sequence[str] = (),
    recovers_from: str | None = None,
    place: str = "",
) -> bytes:
    """README.md: front matter for the hub, and what there is to know of how the folder was made.

    `base_models` are hub ids, also as `hf://org/name@revision`; what can be none is left out of the front matter, and
    named in a comment there. `relation` is one of `RELATIONS`, `library` transformers, peft or None. `files` gives
    bytes by name, `dtypes` elements by type, `quantization` is what `quantization_of` says, `configurations` are
    merge files. `recovers_from` is the original of what is a difference, `place` where it is published, as in
    hf://org/name. Names from files can say nothing in Markdown, HTML or YAML but themselves.
    """
    ids = {name: hub_id(name) for name in base_models}
    metadata = _front_matter([found for found in ids.values() if found], relation, library)
    comments = [f"# base_model: {escape(name)} is no repository on the hub" for name, found in ids.items() if not found]
    parts = ["\n".join(["---", metadata.rstrip("\n"), *comments, "---"]), f"# {_plain(title)}"]
    kind = "An adapter" if library == "peft" else "A model" if recovers_from is None else "A difference"
    of = " and ".join(map(_code, base_models))
    parts.append(f"{kind} made {f'from {of} ' if of else ''}with weightops.")
    if quantization:
        parts.append(f"It is quantised: {_plain(quantization)}.")
    if steps:
        parts.append("## How it was made")
        parts.append("\n".join(f"{number}. {_code(step)}" for number, step in enumerate(steps, 1)))
    if configurations:
        parts.append("## Merge configuration")
        parts.append("In the language of mergekit; mergekit_config.yml has it as it was given.")
        parts += [_block(text, "yaml") for text in configurations]
    parts.append("## What it holds")
    parts.append("\n".join(_holdings(files, dtypes or {}, content_id)))
    here = "./" + place.rstrip("/").rpartition("/")[2].partition("@")[0] if place else "."
    if place:
        parts.append("To get it, every file held against its digest, and to verify it at any time:")
        parts.append(_block(f"weightops download {place} --out {here}\nweightops verify {here}", ""))
    else:
        parts.append("`weightops verify .` holds the folder against its `weightops-manifest.json`.")
    if recovers_from is not None:
        parts.append("## How to recover the model")
        parts.append("This is the difference from an original, and no model by itself. With the original beside it:")
        parts.append(_block(f"weightops recover --raw {recovers_from} --diff {here} --out ./recovered", ""))
    if warnings:
        parts.append("## Warnings")
        parts.append("\n".join(f"- {_plain(warning)}" for warning in warnings))
    parts.append("## Licence")
    parts.append("None is stated here. Those of the models and adapters that it was made from apply; add them above.")
    return ("\n\n".join(parts) + "\n").encode()


def hub_id(name: str) -> str | None:
    """`org/name` from `org/name`, `hf://org/name` or `hf://org/name@revision`; None for anything else."""
    plain = name.removeprefix("hf://").partition("@")[0] if name.startswith("hf://") else name
    return plain if _HUB_ID.fullmatch(plain) else None


def _front_matter(ids: Sequence[str], relation: str | None, library: str | None) -> str:
    import yaml  # imported here because few runs write a card

    metadata: dict[str, Any] = {"library_name": library} if library else {}
    if ids:
        metadata["base_model"] = ids[0] if len(ids) == 1 else list(ids)
        if relation is not None:
            metadata["base_model_relation"] = relation
    metadata["tags"] = [
        "weightops",
        *(["mergekit", "merge"] if relation == "merge" else []),
        *(["lora"] if library == "peft" else []),
    ]
    text: str = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return text


def _holdings(files: Mapping[str, int], dtypes: Mapping[str, int], identity: str | None) -> list[str]:
    count = f"{len(files)} weight file{'s' if len(files) != 1 else ''}"
    lines = [f"- {count}, {sum(files.values()):,} bytes"]
    lines += [f"- {numel:,} elements of {dtype}" for dtype, numel in sorted(dtypes.items())]
    if identity is not None:
        lines.append(f"- content id `{identity}`: the same in whatever files these tensors are")
    return lines


def _parameters(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Elements by dtype."""
    found: dict[str, int] = {}
    for spec in specs:
        found[spec.dtype.value] = found.get(spec.dtype.value, 0) + spec.numel
    return found


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", _shown(text))


def _code(text: str) -> str:
    """A code span, with more backticks around it than are in it."""
    shown = _shown(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _block(text: str, language: str) -> str:
    """A block of code, with a longer fence around it than is in it."""
    shown = "\n".join(_shown(line) for line in text.rstrip("\n").split("\n"))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}{language}\n{shown}\n{fence}"


def _shown(text: str) -> str:
    """As `escape`, of any length."""
    return "".join(escape(character) for character in text)
