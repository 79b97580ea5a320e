"""Special tokens and chat templates of a Hugging Face folder, as `gguf.SpecialVocab` takes them from it.

Its rules are followed to the letter, since what llama.cpp does at the ends of a text rests on them:
tokenizer_config.json names tokens, whose ids come from tokenizer.json alone; config.json gives what is still missing;
the post-processor says what is put around a text.
Source: gguf (vocab.py, gguf_writer.py) as llama-cpp-python 0.3.36 has it, newer than the package gguf 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightops.errors import CorruptInput
from weightops.io.escape import escape
from weightops.layouts.tokenizers.files import (
    CONFIG,
    MORE_TEMPLATES,
    OLD_TEMPLATE,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TokenizerFiles,
)

_TYPES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # seperator: so it is spelt in the format
_WRITTEN = ("bos", "eos", "eot", "eom", "unk", "sep", "pad", "mask")
_ADDED = ("bos", "eos", "sep")
"""What the format has keys for."""


@dataclass
class SpecialVocab:
    """`ids` of special tokens by type, whether they are put around a text (`added`), and the templates by name.

    Of the templates "" is the one that is used where none is named. All are in the order of their keys in the file.
    """

    ids: dict[str, int] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """The keys of a GGUF file."""
        result: dict[str, dict[str, Any]] = {}
        for kind, number in self.ids.items():
            if kind in _WRITTEN:
                result[f"tokenizer.ggml.{_KEYS.get(kind, kind)}_token_id"] = {"uint32": number}
        result |= {f"tokenizer.ggml.add_{kind}_token": {"bool": v} for kind, v in self.added.items() if kind in _ADDED}
        named = {name: text for name, text in self.templates.items() if name}
        result |= {f"tokenizer.chat_template.{name}": {"string": text} for name, text in named.items()}
        if named:
            result["tokenizer.chat_templates"] = {"array": ["string", list(named)]}
        if "" in self.templates:
            result["tokenizer.chat_template"] = {"string": self.templates[""]}
        return result


def special_vocab(files: TokenizerFiles, rows: int) -> SpecialVocab:
    """What the files say of special tokens and templates; `rows` is the number of tokens. Raises `CorruptInput`."""
    tokenizer, config = files.document(TOKENIZER), files.document(TOKENIZER_CONFIG)
    found = SpecialVocab()
    types = list(_TYPES)
    if tokenizer:
        _around_a_text(tokenizer, config, types, found.added)
    if config:
        _take_templates(files, config, found)
    ids = {_content(token): _get(token, "id") for token in reversed(_items(tokenizer.get("added_tokens")))}
    stated: list[tuple[str, object]] = []
    for kind in types if config else ():
        if isinstance(added := config.get(f"add_{kind}_token"), bool):
            found.added.setdefault(kind, added)
        stated.append((kind, ids.get(content) if (content := _content(config.get(f"{kind}_token"))) else None))
    numbers = files.document(CONFIG)
    for kind in types:
        number = numbers.get(f"{kind}_token_id")
        within = _get(numbers.get("text_config"), f"{kind}_token_id")
        stated.append((kind, within if number is None else number))
    for kind, number in stated:
        if type(number) is not int or number < 0 or kind in found.ids:
            continue
        if number < rows:
            found.ids[kind] = number
        else:
            found.warnings.append(f"the {kind} token {number} is left out: there are {rows} tokens")
    return found


def _around_a_text(
    tokenizer: Mapping[str, Any], config: dict[str, Any], types: list[str], added: dict[str, bool]
) -> None:
    """What the post-processor puts around a text; names that it gives to tokens go into `config`, new `types` too.

    Of templates only those are understood that begin and end with one token each.
    """
    has_config = bool(config)
    bos, cls, eos, sep = (config.get(f"{kind}_token") for kind in ("bos", "cls", "eos", "sep"))
    if not bos and cls:
        config["bos_token"] = bos = cls
    if not eos and sep:
        config["eos_token"] = eos = sep
    top = tokenizer.get("post_processor") or {}
    for processor in _items(_get(top, "processors")) or [top]:
        match _get(processor, "type"):
            case "ByteLevel":
                added.setdefault("bos", False)
                added.setdefault("eos", False)
            case "RobertaProcessing":
                added |= {"bos": True, "eos": True, "sep": True}
                if not cls and has_config:
                    config["cls_token"] = cls = next(iter(_items(_get(processor, "cls"))), bos)
                if not sep and has_config:
                    config["sep_token"] = sep = next(iter(_items(_get(processor, "sep"))), eos)
            case "TemplateProcessing":
                single, pair = (_items(_get(processor, name)) for name in ("single", "pair"))
                first = _special(single[0]) if len(single) > 1 else None
                last = _special(single[-1]) if len(single) > 1 else None
                if first:
                    if not has_config:
                        bos = first
                    elif first not in (bos, cls):
                        config["bos_token"] = bos = bos or first
                        config["cls_token"] = cls = cls or first
                    added["bos"] = first in (bos, cls)
                if last:
                    if not has_config:
                        eos = last
                    elif last != eos:
                        if (other := next((kind for kind in ("eot", "eom") if kind not in types), None)) is not None:
                            types.append(other)
                            config[f"{other}_token"] = eos
                        config["eos_token"] = eos = last
                    added["eos"] = True
                between = _between(pair, first, last)
                if between:
                    ends = [text for text in (sep, eos) if text]
                    second = len(between) == 2 and _special(between[1]) in ends
                    added["sep"] = second or (not last and _special(between[0]) in ends)
                    if added["sep"] and not sep and has_config:
                        config["sep_token"] = eos


def _between(pair: list[Any], first: str | None, last: str | None) -> list[Any]:
    """What a template for two texts puts between them."""
    start = 1 if pair and first and _special(pair[0]) == first else 0
    stop = -1 if pair and last and _special(pair[-1]) == last else None
    inner = pair[start:stop]
    if not inner or (_sequence(inner[0]), _sequence(inner[-1])) != ("A", "B"):
        return []
    return inner[1:-1]


def _take_templates(files: TokenizerFiles, config: Mapping[str, Any], found: SpecialVocab) -> None:
    """tokenizer_config.json's own templates, or else those of files; which are left out is said."""
    beside = _templates_beside(files)
    own = dict(_named(config["chat_template"])) if "chat_template" in config else None
    found.templates |= beside if own is None else own
    if own is not None and beside and beside != own:
        other = TEMPLATE if TEMPLATE in files else OLD_TEMPLATE
        found.warnings.append(f"{other} is left out: llama.cpp takes the chat template of {TOKENIZER_CONFIG}")
    if (more := files.added_templates()) and TEMPLATE not in files:
        found.warnings.append(f"{', '.join(map(escape, more))}: left out, as llama.cpp does without {TEMPLATE}")


def _templates_beside(files: TokenizerFiles) -> dict[str, str]:
    if TEMPLATE in files:
        named = [
            {"name": name.removeprefix(MORE_TEMPLATES).removesuffix(".jinja"), "template": _text(files, name)}
            for name in files.added_templates()
        ]
        return {**dict(_named(named)), "": _text(files, TEMPLATE)}
    return dict(_named(files.document(OLD_TEMPLATE).get("chat_template")))


def _named(value: object) -> Iterator[tuple[str, str]]:
    """Templates by name, of one or of a list of them; names have letters, digits and _ only."""
    if isinstance(value, str):
        yield "", value
    default = None
    for entry in _items(value):
        name, text = _get(entry, "name"), _get(entry, "template")
        if not isinstance(name, str) or not name or not isinstance(text, str):
            continue
        name = re.sub("[^A-Za-z0-9]", "_", name)
        if name == "default":
            default = text
        else:
            yield name, text
    if default is not None:
        yield "", default


def _text(files: TokenizerFiles, name: str) -> str:
    try:
        # As Python reads text: any line end is one.
        return files.files[name].decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise CorruptInput(f"{escape(files.shown(name))}: not UTF-8") from None


def _content(token: object) -> str | None:
    """The text of a token, which stands there as it is or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special(part: object) -> str | None:
    found = _get(_get(part, "SpecialToken"), "id")
    return found if isinstance(found, str) else None


def _sequence(part: object) -> object:
    return _get(_get(part, "Sequence"), "id")


def _get(value: object, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
