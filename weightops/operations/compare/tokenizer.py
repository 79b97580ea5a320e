"""What the tokenizers and chat templates of two checkpoints differ in, part by part."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.source import Source, beside
from weightops.layouts.tokenizers.files import OLD_TEMPLATE, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TokenizerFiles
from weightops.layouts.tokenizers.ranks import from_unicode
from weightops.layouts.tokenizers.read import read_tokenizer
from weightops.layouts.tokenizers.tokenizer_json import added_tokens, merge_pairs
from weightops.layouts.tokenizers.tokens import MAX_TOKENS
from weightops.operations.compare.entries import Entries
from weightops.operations.compare.report import TokenizerChange

_SHOWN = 8
_MAX_DIFF, _MAX_LINES, _MAX_LINE = 400, 4000, 2000
_PARTS = {
    "normalizer": "the normaliser, which rewrites text before it is cut",
    "pre_tokenizer": "the pre-tokenizer, which cuts text into words",
    "post_processor": "the post-processor, which puts special tokens around a text",
    "decoder": "the decoder, which makes text of tokens",
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "clean_up_tokenization_spaces",
    "tokenizer_class",
)


@dataclass(frozen=True)
class Words:
    """A tokenizer, as far as it can be read: tokens by id, as its files spell them."""

    tokens: Mapping[int, str] = field(default_factory=dict)
    merges: tuple[tuple[str, str], ...] | None = None
    added: Mapping[int, tuple[str, bool]] = field(default_factory=dict)
    """Texts of added tokens, and whether they are special."""
    document: Mapping[str, Any] | None = None
    """tokenizer.json."""
    config: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be read, if there is one."""

    @property
    def is_there(self) -> bool:
        """Whether there is a tokenizer that could be read."""
        return bool(self.tokens)

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps([(self.document or {}).get(part) for part in _PARTS])

    def text(self, number: int) -> str | None:
        """What a token stands for, as people read it; None where there is no such token."""
        if number in self.added:
            return self.added[number][0]
        spelt = self.tokens.get(number)
        if spelt is None or not self._is_byte_level:
            return None if spelt is None else spelt.replace("\u2581", " ")
        try:
            return from_unicode(spelt).decode("utf-8", "replace")
        except ValueError:
            return spelt


def read_words(entries: Entries) -> Words:
    """The tokenizer that lies with a checkpoint; a problem is kept, not raised."""
    try:
        return _gguf(entries.metadata) if entries.layout == "gguf" else _files(entries)
    except (CorruptInput, UsageError, RecursionError) as error:
        return Words(problem=str(error))


def tokenizer_changes(a: Words, b: Words) -> tuple[list[TokenizerChange], list[str]]:
    """Every part that differs; and what there is to say where the two cannot be compared."""
    notes = [f"{side} tokenizer is not compared: {w.problem}" for side, w in (("A's", a), ("B's", b)) if w.problem]
    if a.is_there != b.is_there and not notes:
        notes.append(f"the tokenizers are not compared: {'A' if b.is_there else 'B'} has none")
    found = list(_changes(a, b)) if a.is_there and b.is_there else []
    return [*found, *_template_changes(a.templates, b.templates)], notes


def _files(entries: Entries) -> Words:
    source = Source(entries.checkpoint, beside(entries.checkpoint, None), lambda _: b"")
    files = source.tokenizer_files(layout="hf" if entries.layout in (None, "hf") else entries.layout)
    config = files.document(TOKENIZER_CONFIG)
    templates = dict(_templates(files, config))
    if TOKENIZER in files:
        return _tokenizer_json(files, config, templates)
    tokenizer = read_tokenizer(files, generation="3", instruct=False)
    if tokenizer is None:
        return Words(config=config, templates=templates)
    tokens = {i: token.data.decode("utf-8", "replace") for i, token in enumerate(tokenizer.tokens)}
    added = {number: (text, bool(special)) for number, text, special in files.added()}
    return Words(tokens, None, added, None, config, templates)


def _tokenizer_json(files: TokenizerFiles, config: Mapping[str, Any], templates: Mapping[str, str]) -> Words:
    where = files.shown(TOKENIZER)
    document = strict_json.load_object(files.files[TOKENIZER], where)
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        tokens = {number: text for text, number in vocabulary.items() if type(number) is int}
    elif isinstance(vocabulary, list):
        tokens = {i: entry[0] for i, entry in enumerate(vocabulary[:MAX_TOKENS]) if entry and isinstance(entry[0], str)}
    found = added_tokens(document.get("added_tokens") or [], f"{where}: added_tokens")
    added = {number: (token.data.decode(), token.kind.name == "CONTROL") for number, token in found.items()}
    merges = merge_pairs(model["merges"], f"{where}: merges") if isinstance(model, dict) and "merges" in model else None
    return Words(tokens, merges, added, document, config, templates)


def _gguf(metadata: Mapping[str, Any]) -> Words:
    array = metadata.get("tokenizer.ggml.tokens", {}).get("array", ["string", []])[1]
    template = metadata.get("tokenizer.chat_template", {}).get("string")
    return Words(dict(enumerate(array)), templates={} if template is None else {"default": template})


def _changes(a: Words, b: Words) -> Iterator[TokenizerChange]:
    one, other = _ids(a), _ids(b)
    yield from _lone("vocabulary", "tokens", a, b, one, other)
    moved = [text for text, number in one.items() if text in other and other[text] != number]
    if moved:
        shown = ", ".join(f"{_shown(text)} {one[text]} → {other[text]}" for text in moved[:_SHOWN])
        yield TokenizerChange(part="ids", text=f"{_count(len(moved), 'token')} with another id: {shown}{_more(moved)}")
    if a.merges is not None and b.merges is not None and a.merges != b.merges:
        pairs = set(a.merges) ^ set(b.merges)
        what = f"{len(pairs)} are in one of the two alone" if pairs else "they are the same in another order"
        yield TokenizerChange(part="merges", text=f"{len(a.merges)} merges in A, {len(b.merges)} in B: {what}")
    if a.document is not None and b.document is not None:
        yield from _document_changes(a, b)
    yield from _setting_changes(a.config, b.config)


def _ids(words: Words) -> dict[str, int]:
    return {text: number for number, text in words.tokens.items()} | {t: n for n, (t, _) in words.added.items()}


def _lone(
    part: str, what: str, a: Words, b: Words, one: Mapping[str, int], other: Mapping[str, int]
) -> Iterator[TokenizerChange]:
    for side, words, mine, theirs in (("A", a, one, other), ("B", b, other, one)):
        lone = [text for text in mine if text not in theirs]
        if lone:
            shown = ", ".join(f"{_shown(words.text(mine[text]) or text)} ({mine[text]})" for text in lone[:_SHOWN])
            are = "is" if len(lone) == 1 else "are"
            text = f"{_count(len(lone), what.removesuffix('s'))} {are} in {side} alone: {shown}{_more(lone)}"
            yield TokenizerChange(part=part, text=text)


def _document_changes(a: Words, b: Words) -> Iterator[TokenizerChange]:
    assert a.document is not None
    assert b.document is not None
    odd = [n for n in a.added if n in b.added and a.added[n][0] == b.added[n][0] and a.added[n] != b.added[n]]
    if odd:
        shown = ", ".join(_shown(a.added[number][0]) for number in odd[:_SHOWN])
        yield TokenizerChange(part="special tokens", text=f"special in one of the two alone: {shown}{_more(odd)}")
    for part, meaning in _PARTS.items():
        old, new = a.document.get(part), b.document.get(part)
        if old != new:
            yield TokenizerChange(part=part.replace("_", " "), text=f"{meaning}, is another", diff=_json_diff(old, new))
    options = [{k: v for k, v in _model(w).items() if k not in ("vocab", "merges")} for w in (a, b)]
    if options[0] != options[1]:
        yield TokenizerChange(part="model", text="the settings of its model are others", diff=_json_diff(*options))


def _model(words: Words) -> dict[str, Any]:
    model = (words.document or {}).get("model")
    return model if isinstance(model, dict) else {}


def _setting_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[TokenizerChange]:
    for names, part in ((_SPECIAL, "special tokens"), (_SETTINGS, "settings")):
        for name in names:
            old, new = (_content(config.get(name)) for config in (a, b))
            if old != new and a and b:
                yield TokenizerChange(part=part, text=f"{name} is {_value(old)} in A and {_value(new)} in B")


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _value(value: Any) -> str:
    return "not set" if value is None else escape(json.dumps(value, ensure_ascii=False))[:80]


def _templates(files: TokenizerFiles, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Chat templates by name, wherever they are kept."""
    own = config.get("chat_template")
    if isinstance(own, str):
        yield "default", own
    for entry in own if isinstance(own, list) else ():
        match entry:
            case {"name": str(name), "template": str(template)}:
                yield name, template
    old = files.document(OLD_TEMPLATE).get("chat_template")
    if isinstance(old, str):
        yield "default", old
    for name in (TEMPLATE, *files.added_templates()):
        if name in files:
            known = "default" if name == TEMPLATE else name.rpartition("/")[2].removesuffix(".jinja")
            yield known, files.files[name].decode("utf-8", "replace")


def _template_changes(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[TokenizerChange]:
    for name in dict.fromkeys([*a, *b]):
        old, new = a.get(name), b.get(name)
        if old == new:
            continue
        what = f"the template {escape(name)!r}"
        if old is None or new is None:
            yield TokenizerChange(part="chat template", text=f"{what} is in {'B' if old is None else 'A'} alone")
        else:
            yield TokenizerChange(part="chat template", text=f"{what} differs", diff=_diff(old, new))


def _json_diff(old: Any, new: Any) -> tuple[str, ...]:
    return _diff(*(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) for value in (old, new)))


def _diff(old: str, new: str) -> tuple[str, ...]:
    """The lines of a unified diff; none for texts of so many lines that making one would take long."""
    one, other = old.splitlines(), new.splitlines()
    if max(len(one), len(other)) > _MAX_LINES:
        return ()
    lines = difflib.unified_diff(one, other, "A", "B", lineterm="", n=2)
    found = [line[:_MAX_LINE] for line, _ in zip(lines, range(_MAX_DIFF + 1), strict=False)]
    return tuple(found[:_MAX_DIFF]) + (("… more",) if len(found) > _MAX_DIFF else ())


def _shown(text: str) -> str:
    return repr(escape(text)[:40])


def _count(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _more(found: list[Any]) -> str:
    return f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
