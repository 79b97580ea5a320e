"""What tensors a model of some config has: their names in files, shapes and ties, as transformers' own class says.

Looking takes seconds, mostly for importing transformers, so what was found is kept in a file under the config's digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.errors import WeightopsError
from weightops.io.atomic import write_whole
from weightops.layouts.counts import beyond_files, beyond_models, numbers
from weightops.version import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = 1
_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config", "use_cache")
_MAX_NBYTES = 100 << 20
_TENSORS = 20_000
"""About as many as the largest models have, in the form in which transformers holds them."""

Shapes = dict[str, tuple[int, ...]]


class Architecture(msgspec.Struct, frozen=True):
    """The tensors of a model.

    `stored` has the names and shapes that transformers gives them in files, `loaded` those of its modules, which files
    may have too. `tied` are groups of names of which one suffices, in both ways of naming. Names that match
    `may_lack` are computed if they are not there, those that match `may_have` are left alone. `prefix` is the first
    part of the names of the base model, which files may lack, or have where the model does not.
    """

    name: str
    by: str
    stored: Shapes
    loaded: Shapes
    tied: tuple[tuple[str, ...], ...] = ()
    may_lack: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()
    prefix: str = ""


class NotKnown(Exception):
    """Nothing says what tensors a model should have; the message says why."""


class BeyondFiles(NotKnown):
    """config.json asks for more than the files have tensors for."""


def find(config: Mapping[str, Any], checkpoint: Checkpoint, cache: Path | None) -> Architecture:
    """The architecture of a config.json for the files of `checkpoint`, from the folder `cache` if it is there.

    Raises `NotKnown`, before anything is built for a config that is `BeyondFiles`.
    """
    if all(key.endswith("_id") for key, _ in numbers(config)):
        raise NotKnown("config.json does not say how large the model is")
    excess = beyond_files(config, checkpoint)
    if excess:
        raise BeyondFiles(excess)
    key = _digest(config)
    known = None if cache is None else _read(cache / f"{key}.json")
    if known is not None:
        return known
    found = _look(config, len(checkpoint))
    if cache is not None:
        _write(cache / f"{key}.json", found)
    return found


def find_without_files(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json whose files are not at hand; raises as `find` does."""
    excess = beyond_models(config)
    if excess:
        raise BeyondFiles(excess)
    return _look(config, _TENSORS)


def _digest(config: Mapping[str, Any]) -> str:
    own = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    versions = {name: library_versions().get(name) for name in ("weightops", "torch", "transformers")}
    return hashlib.sha256(json.dumps([_FORMAT, versions, own], sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Architecture | None:
    """What an earlier look has left, if it is whole."""
    try:
        if path.stat().st_size > _MAX_NBYTES:
            return None
        return msgspec.json.decode(path.read_bytes(), type=Architecture)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _write(path: Path, found: Architecture) -> None:
    """Leave it for the next; where that is not possible, that one looks again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, msgspec.json.encode(found))
    except (OSError, WeightopsError):
        return


def older_names(config: Mapping[str, Any], checkpoint: Checkpoint, names: Collection[str]) -> dict[str, str]:
    """What `names` of files, older ones too, are loaded into, as far as transformers knows; nothing where it fails."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from weightops.layouts.skeleton import build_for_names, parse_config

    try:
        with _quiet():
            model = build_for_names(parse_config(config, ""), config.get("architectures"), len(checkpoint))
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        found = {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in names}
    except Exception:  # transformers raises what it likes
        return {}
    return {name: target for name, target in found.items() if target in state}


def _look(config: Mapping[str, Any], n_tensors: int) -> Architecture:
    from weightops.layouts.skeleton import TooManyParts, build_for_names, parse_config

    try:
        with _quiet():
            return _described(build_for_names(parse_config(config, ""), config.get("architectures"), n_tensors))
    except WeightopsError as error:
        raise NotKnown(str(error).removeprefix(": ")) from error
    except TooManyParts as error:
        raise BeyondFiles(f"config.json asks for many more tensors than the {n_tensors} that there are") from error
    except Exception as error:  # transformers raises what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NotKnown(f"transformers makes no {config.get('model_type')} of config.json: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of settings, which is for whoever runs the model."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _described(model: PreTrainedModel) -> Architecture:
    from transformers import __version__
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    stored = revert_weight_conversion(model, dict(state))
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        for name in (source, target):
            own = [name, *revert_weight_conversion(model, {name: state[name]})] if name in state else [name]
            groups.setdefault(source, []).extend(n for n in own if n not in groups.get(source, ()))
    patterns = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]
    return Architecture(
        name=type(model).__name__,
        by=f"transformers {__version__}",
        stored=_shapes(stored),
        loaded=_shapes(state),
        tied=tuple(tuple(dict.fromkeys(group)) for group in groups.values()),
        may_lack=tuple(sorted(model._keys_to_ignore_on_load_missing or ())),
        may_have=tuple(patterns),
        prefix=model.base_model_prefix,
    )


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
