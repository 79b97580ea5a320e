"""LoRA adapters to GGUF and back: which base they are for, and what of their folders goes along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightops.checkpoint import Checkpoint, Written
from weightops.errors import SourceMissing, UsageError
from weightops.formats.adapter.files import (
    CONFIG_NAME,
    is_adapter,
    is_gguf_adapter,
    looks_like_adapter,
    refuse_adapter,
    trained_beside,
)
from weightops.formats.adapter.lora import read_adapter
from weightops.formats.choose import is_weights
from weightops.formats.folder import read_place
from weightops.formats.places import find_place, is_repository_name
from weightops.formats.quantized.gguf import is_gguf
from weightops.formats.sidecars import Kind, kind_of
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.io.source_file import SourceFile
from weightops.layouts import gguf
from weightops.layouts.source import beside
from weightops.layouts.tokenizers.files import CONFIG, GENERATION, TokenizerFiles
from weightops.operations.convert.said import left_out
from weightops.spec import DType
from weightops.stores.local import LocalStore, read_source
from weightops.stores.stores import Stores

_GOES = (Kind.NOTICE, Kind.CARD)
_NAMED = "base_model_name_or_path"
_ASK = "--base: the model's folder, its config.json, a GGUF file of it or hf://org/name; its weights are not read"


def is_lora(source: Checkpoint) -> bool:
    """Whether a source is an adapter, as peft saves it or in GGUF."""
    return is_gguf_adapter(source) or looks_like_adapter(source)


def convert_adapter(
    source: Checkpoint,
    *,
    to: str,
    find: Callable[[str | None], gguf.Base],
    dtype: DType | None,
    mix: gguf.Mix | None,
    options: Mapping[str, Any],
) -> Checkpoint:
    """An adapter in GGUF, or one in GGUF as peft saves it; `find` gives the model that it is
    for, told what the adapter itself calls it (`find_base`).

    Raises `UsageError` for other layouts and for `options`, which are those of models, and without a base;
    `IncompatibleInputs` for layouts of models, and as `gguf.write_adapter` and `gguf.read_adapter` do.
    """
    where = escape(source.name)
    if to not in ("gguf", "hf"):
        refuse_adapter(source, "the source")
    if is_gguf_adapter(source) != (to == "hf"):
        raise UsageError(
            f"{where} is a LoRA adapter{' in GGUF' if to == 'gguf' else ' as peft saves it'} already",
            hint=f"--to {'hf' if to == 'gguf' else 'gguf'} converts it; `weightops merge-lora` makes a model of it",
        )
    given = next((name for name, value in options.items() if value or value is False), None)
    if given is not None:
        raise UsageError(f"{where} is a LoRA adapter, for which {given} has no use", hint="leave it out")
    if to == "hf":
        return gguf.read_adapter(source, find(None), dtype)
    if mix is not None and not (mix.is_plain and mix.name.lower() == DType.Q8_0.value):
        hint = "choose float32, float16, bfloat16 or q8_0"
        raise UsageError(f"adapters are not written in {mix.name.lower()}", hint=hint)
    if CONFIG_NAME not in source.sidecars and source.folder is not None:  # a weight file, named by itself
        config = Written(source.folder.get(CONFIG_NAME))
        source = replace(source, name=source.folder.name, sidecars={CONFIG_NAME: config})
    _refuse_beside(source)
    adapter = read_adapter(source)
    named = strict_json.load_object(source.sidecar(CONFIG_NAME) or b"{}", f"{where}: {CONFIG_NAME}").get(_NAMED)
    found = find(named if isinstance(named, str) and named else None)
    made = gguf.write_adapter(adapter, found, _about(source), (DType.Q8_0 if mix else dtype) or DType.F32)
    return replace(made, warnings=(*made.warnings, *left_out(made.dropped)))


def _refuse_beside(source: Checkpoint) -> None:
    """Refuse what was trained with an adapter and lies in files beside it, of which GGUF has nothing."""
    names = source.folder.names() if source.folder is not None and is_adapter(source) else []
    trained = [name for name in trained_beside(filter(is_weights, names)) if name not in source.shards.values()]
    if trained:
        raise UsageError(
            f"{escape(source.name)}: {listed(trained)} beside the adapter may hold weights that were trained with it, "
            "for which adapters in GGUF have no place",
            hint="`weightops merge-lora` puts them into the base; or name the weight file of the adapter itself",
        )


def _about(source: Checkpoint) -> gguf.Saved:
    """What of an adapter's folder is no weight."""
    read = beside(source, None)
    files = {name: data for name in (CONFIG, GENERATION) if (data := read(name)) is not None}
    tokenizer = TokenizerFiles(files, escape(source.name))
    sidecars = {name: file for name, file in source.sidecars.items() if kind_of(name) in _GOES}
    lost = sorted(source.sidecars.keys() - sidecars.keys() - {CONFIG_NAME, CONFIG, GENERATION})
    notes = (f"{', '.join(map(escape, lost))}: left out, as gguf has no place for it",) if lost else ()
    return gguf.Saved(
        name=source.name,
        config=tokenizer.document(CONFIG),
        tensors=source.tensors,
        files=tokenizer,
        card=read("README.md"),
        sidecars=sidecars,
        warnings=notes,
    )


def find_base(source: Checkpoint, path: str | None, stores: Stores | None, named: str | None) -> gguf.Base:
    """The base at `path`, or else in the folder that the adapter's own config names, if that is on this machine."""
    if path is not None:
        return _read_base(path, stores or Stores())
    if named is not None and _is_here(named):
        return _read_base(named, stores or Stores())
    what = f"the base, {escape(named)[:200]}, is not on this machine" if named else "nothing says what its base is"
    is_name = named is not None and is_repository_name(named)
    raise UsageError(
        f"{escape(source.name)}: {what}, and how rows and layers lie in GGUF depends on its config.json",
        hint=f"give --base hf://{escape(str(named))}, or a folder of it; only its config.json is read"
        if is_name
        else f"give {_ASK}",
    )


def _is_here(named: str) -> bool:
    """Whether a text that a file holds is the path of a folder with a config.json."""
    try:
        return LocalStore(Path(named)).has(CONFIG)
    except (OSError, ValueError):  # no path at all
        return False


def _read_base(path: str, stores: Stores) -> gguf.Base:
    """The config of the model in a folder, here or on a hub, in a config.json itself, or in a GGUF file."""
    with stores.connected():
        place = find_place(path, stores)
        data: bytes | None = None
        if not isinstance(place, SourceFile):
            data = place.get(CONFIG) if place.has(CONFIG) else None
        elif place.name.endswith(".json") and not place.is_remote:
            data = read_source(Path(place.path))[1]
        if data is not None:
            where = escape(place.name)
            return gguf.Base(strict_json.load_object(data, f"{where}/{CONFIG}", constants=True), where)
        found = read_place(place, stores)
    refuse_adapter(found, "the base")
    if not is_gguf(found):
        raise SourceMissing(f"{escape(path)}: has no {CONFIG}, and is no GGUF file", hint=f"give {_ASK}")
    return gguf.Base(gguf.config_in(found), escape(found.name))
