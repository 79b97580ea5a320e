"""Tokens that are added, what ends a turn, and the chat template: the four places that have to say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightops.checkpoint import written_json
from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.token_ids import text_parts, with_parts
from weightops.layouts.tokenizers.files import (
    CONFIG,
    GENERATION,
    OLD_TEMPLATE,
    SPECIAL_MAP,
    TEMPLATE,
    TOKENIZER_CONFIG,
)
from weightops.layouts.tokenizers.meaning import read_meanings
from weightops.layouts.tokenizers.vocabulary import FolderVocabulary
from weightops.operations.vocab.body import Body
from weightops.operations.vocab.change import Change, Row, Rule, mixed

_EOS = "eos_token_id"
_VARIABLE = "eos_token"
"""What chat templates call the token that ends a text."""


def with_tokens(body: Body, change: Change, texts: Sequence[str], init: str, *, special: bool) -> Change:
    """With tokens added behind the others, and a row for each: one that nothing used is taken first.

    `init` says how rows are made; see `initial_row`. Raises `UsageError` for texts that are no tokens.
    """
    vocabulary = change.vocabulary(body.where)
    empty = next((text for text in texts if not text.strip()), None)
    if empty is not None:
        raise UsageError(f"{empty!r} is no token: expected a text", hint="--add-token '<|im_end|>'")
    made = vocabulary.with_tokens(texts, special=special)
    ids = made.ids
    inputs, outputs = list(change.inputs), list(change.outputs)
    there = [text for text in texts if text in vocabulary.ids]
    new = [text for text in dict.fromkeys(texts) if text not in vocabulary.ids]
    for text in new:
        row = initial_row(change, vocabulary, init, text)
        for rows, own in zip((inputs, outputs), row, strict=True):
            rows += ["zero"] * (ids[text] + 1 - len(rows))
            rows[ids[text]] = own
    done = [f"added: {', '.join(f'{escape(text)} ({ids[text]})' for text in new)}"] if new else []
    done += [f"a token already: {', '.join(f'{escape(text)} ({ids[text]})' for text in there)}"] if there else []
    return replace(change, inputs=inputs, outputs=outputs, files=made.files, known=made, done=(*change.done, *done))


def initial_row(change: Change, vocabulary: FolderVocabulary | None, init: str, text: str | None) -> tuple[Row, Row]:
    """The row of a new token, or of none, in embedding and head, by a rule: mean, zero, normal, copy:TOKEN or pieces.

    `pieces` is the mean of the rows of the pieces that the text is cut into, and `mean` where there is no text or none
    of its pieces has a row. Raises `UsageError` for a rule that there is not.
    """
    rules: Mapping[str, Rule] = {"mean": "mean", "zero": "zero", "normal": "normal"}
    if init in rules:
        return rules[init], rules[init]
    if init.startswith("copy:"):
        token = init.removeprefix("copy:")
        number = vocabulary.ids.get(token) if vocabulary is not None else None
        if number is None or number >= change.count:
            raise UsageError(f"--init {escape(init)}: {escape(token)} is no token with a row", hint="--init copy:TOKEN")
        return change.inputs[number], change.outputs[number]
    if init != "pieces":
        raise UsageError(
            f"--init {escape(init)}: there is no such rule", hint="known are mean, copy:TOKEN, pieces, zero and normal"
        )
    pieces = read_meanings(vocabulary).split(text.encode()) if vocabulary is not None and text is not None else []
    pieces = [piece for piece in pieces if piece < change.count]
    weights = [1 / max(1, len(pieces))] * len(pieces)
    return mixed(change.inputs, pieces, weights) or "mean", mixed(change.outputs, pieces, weights) or "mean"


def ending_turns(body: Body, change: Change, text: str) -> Change:
    """With a token that ends a turn: the tokenizer's eos, that of config.json, and in generation_config.json's list.

    What ended texts before stays in that list.
    """
    files = dict(change.files)
    number = change.vocabulary(body.where).ids[text]
    config = strict_json.load_object(files[CONFIG], f"{body.where}/{CONFIG}", constants=True)
    generation = _document(files, GENERATION, body)
    before = [generation.get(_EOS), *(part.get(_EOS) for _, part in text_parts(config))]
    ends = list(dict.fromkeys([number, *(each for value in before for each in _listed(value))]))

    def edit(part: Mapping[str, Any]) -> Mapping[str, Any]:
        has_list = isinstance(part.get(_EOS), list)
        return {**part, _EOS: list(dict.fromkeys([number, *part[_EOS]])) if has_list else number}

    files[CONFIG] = written_json(with_parts(config, lambda part: edit(part) if _EOS in part else part)).data
    if not any(_EOS in part for _, part in text_parts(config)):
        files[CONFIG] = written_json({**config, _EOS: number}).data
    if not generation:
        generation = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    files[GENERATION] = written_json({**generation, _EOS: ends}).data
    for name in (TOKENIZER_CONFIG, SPECIAL_MAP):
        document = _document(files, name, body)
        if name == TOKENIZER_CONFIG or name in files:
            token = document.get(_VARIABLE)
            document[_VARIABLE] = {**token, "content": text} if isinstance(token, dict) else text
            files[name] = written_json(document).data
    note = f"{escape(text)} ({number}) ends a turn: in {TOKENIZER_CONFIG}, {CONFIG} and {GENERATION} ({ends})"
    return replace(change, files=files, notes=(*change.notes, note))


def with_template(body: Body, change: Change, path: str) -> Change:
    """With the chat template in a file, in the place of those that there are."""
    file = Path(path)
    if not file.is_file():
        raise SourceMissing(f"{escape(path)}: no such file", hint="--chat-template names a file of Jinja")
    data = file.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError:
        raise CorruptInput(f"{escape(path)}: a chat template that is not UTF-8", hint="convert it to UTF-8") from None
    files = {name: each for name, each in change.files.items() if name != OLD_TEMPLATE} | {TEMPLATE: data}
    config = _document(files, TOKENIZER_CONFIG, body)
    if "chat_template" in config:
        files[TOKENIZER_CONFIG] = written_json({k: v for k, v in config.items() if k != "chat_template"}).data
    return replace(change, files=files, left=(*change.left, OLD_TEMPLATE))


def hold_template(body: Body, change: Change, text: str | None, *, is_given: bool) -> Change:
    """Hold the chat template against what ends a turn: `text`, or else what the tokenizer says.

    A template that is given along and never writes it is refused with `UsageError`; of one that was there it is said.
    """
    template = _template(body, change.files)
    end = text if text is not None else change.vocabulary(body.where).roles.get("eos")
    if template is None or end is None or end in template or _VARIABLE in template:
        return change
    problem = f"the chat template never writes {escape(end)}, which is to end a turn"
    if is_given and text is not None:
        raise UsageError(f"{body.where}: {problem}", hint="the model would not stop: give the token that it writes")
    hint = "--ends-turn says which token does" if is_given else "--chat-template FILE gives another"
    return replace(change, notes=(*change.notes, f"{problem}: the model may not stop; {hint}"))


def _template(body: Body, files: Mapping[str, bytes]) -> str | None:
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", "replace")
    for name in (TOKENIZER_CONFIG, OLD_TEMPLATE):
        found = _document(files, name, body).get("chat_template")
        if found is not None:
            return found if isinstance(found, str) else str(found)
    return None


def _document(files: Mapping[str, bytes], name: str, body: Body) -> dict[str, Any]:
    return strict_json.load_object(files[name], f"{body.where}/{name}") if name in files else {}


def _listed(value: Any) -> list[int]:
    return [each for each in (value if isinstance(value, list) else [value]) if type(each) is int and each >= 0]
