"""Vocab: another vocabulary for a model, and everything that names its tokens moved with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar, Written, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.token_ids import named_ids, text_parts, with_parts
from weightops.layouts.tokenizers.files import CONFIG, GENERATION, PIECES, TOKENIZER
from weightops.lazy import Evaluate
from weightops.operations.check import held_to_class
from weightops.operations.vocab.body import PER_LAYER_KEY, ROW_KEYS, Body, read_body, read_donor
from weightops.operations.vocab.change import Change, described
from weightops.operations.vocab.matrices import Chance, changed_tensors, deviation, per_layer_rows
from weightops.operations.vocab.tokens import ending_turns, hold_template, initial_row, with_template, with_tokens
from weightops.operations.vocab.transplant import Method, transplanted
from weightops.operations.vocab.trim import read_corpus, trimmed

_MOST_ROWS = 1 << 24
_K = 64


def vocab(
    source: Checkpoint,
    tokenizer: Checkpoint | None = None,
    *,
    method: Method | None = None,
    k: int | None = None,
    override: Mapping[str, str] = {},
    trim: str | None = None,
    add_token: Sequence[str] = (),
    special: bool = True,
    ends_turn: bool = False,
    chat_template: str | None = None,
    rows: int | None = None,
    multiple: int | None = None,
    init: str = "mean",
    seed: int = 0,
    evaluate: Evaluate,
) -> Checkpoint:
    """`source` with another vocabulary: rows of embeddings and heads, tokenizer, ids in configs and template together.

    The edits are made in this order. `tokenizer`: another model, whose tokenizer it gets. Rows of common tokens are
    carried to the bit; others are made by `method`: `subword` (the default) the mean of the token's pieces, `mean` that
    of all old rows, `zero`, `omp` a combination of `k` (64) common rows as the donor's row is one of its own, `draft`
    the last piece, and in the head pieces that count half of the one before. `override` makes tokens of the donor of
    other texts. `trim`: a file of text; only the tokens that it needs stay. `add_token`: tokens to add, `special` or
    ordinary ones; with `ends_turn` the last of them ends a turn. `chat_template`: a file that becomes the template.
    `rows` or `multiple`: so many rows, or a multiple of that. `init` makes rows of added tokens and of padding: `mean`
    of all old rows, `copy:TOKEN`, `pieces`, `zero` or `normal` with a `seed`; sums are float64, rounded once.

    Raises `UsageError` for edits that cannot be meant, `IncompatibleInputs` where files, rows and ids disagree.
    """
    _check(tokenizer, method, k, override, trim, add_token, ends_turn, chat_template, rows, multiple)
    body = read_body(source, evaluate)
    change = Change(range(body.rows), range(body.rows), body.files)
    if tokenizer is not None or trim is not None:
        _hold_ids(body.named(), body.rows, body.where, "the embedding has")
    if tokenizer is not None:
        donor = read_body(tokenizer, evaluate) if method == "omp" else read_donor(tokenizer)
        change = transplanted(body, donor, method or "subword", _K if k is None else k, override)
    if trim is not None:
        change = trimmed(body, read_corpus(trim))
    if add_token:
        change = with_tokens(body, change, add_token, init, special=special)
    if ends_turn:
        change = ending_turns(body, change, add_token[-1])
    if chat_template is not None:
        change = with_template(body, change, chat_template)
    if ends_turn or chat_template is not None:
        end = add_token[-1] if ends_turn else None
        change = hold_template(body, change, end, is_given=chat_template is not None)
    change = _padded(body, change, rows, multiple, init)
    return _result(body, change, Chance(seed, deviation(body.config)), evaluate)


def _check(
    tokenizer: Checkpoint | None,
    method: str | None,
    k: int | None,
    override: Mapping[str, str],
    trim: str | None,
    add_token: Sequence[str],
    ends_turn: bool,
    chat_template: str | None,
    rows: int | None,
    multiple: int | None,
) -> None:
    """Raise `UsageError` for options that do not go together."""
    wanted = [tokenizer, trim, add_token, chat_template, rows, multiple]
    if all(each is None or each == () or each == [] for each in wanted):
        raise UsageError("nothing is to be changed", hint="give --tokenizer, --trim, --add-token, --rows or --multiple")
    if tokenizer is None and (method or k is not None or override):
        given = "--method" if method else "--k" if k is not None else "--override"
        raise UsageError(f"{given} is about another tokenizer, and none is given", hint="--tokenizer DONOR")
    if tokenizer is not None and trim is not None:
        raise UsageError("another tokenizer and a trimmed one are two steps", hint="run the command twice")
    if override and method not in ("draft", "subword", None):
        raise UsageError(f"--override gives texts, of which {method} makes nothing", hint="--method draft or subword")
    if ends_turn and not add_token:
        raise UsageError("--ends-turn is about a token, and none is given", hint="--add-token TOKEN, new or not")
    if rows is not None and multiple is not None:
        raise UsageError(
            "--rows and --multiple both say how many rows there are to be", hint="leave out one of the two"
        )
    for name, number in (("--rows", rows), ("--multiple", multiple)):
        if number is not None and not 0 < number <= _MOST_ROWS:
            raise UsageError(
                f"{name} is {number}, expected 1 to {_MOST_ROWS}", hint="`weightops inspect` says how many there are"
            )


def _padded(body: Body, change: Change, rows: int | None, multiple: int | None, init: str) -> Change:
    """With as many rows as are wanted, at least one for each token."""
    is_told = TOKENIZER in change.files or PIECES in change.files or init.startswith("copy:")
    vocabulary = change.vocabulary(body.where) if is_told else None
    needed = vocabulary.count if vocabulary is not None else 0
    count = change.count
    if rows is not None:
        count = rows
        if count < needed:
            raise UsageError(
                f"{body.where}: the tokenizer has {needed} tokens, and {count} rows are asked for",
                hint=f"--rows {needed} or more; --trim takes tokens out",
            )
    elif multiple is not None:
        count = -(-max(count, needed) // multiple) * multiple
    elif needed > count:
        raise IncompatibleInputs(
            f"{body.where}: the tokenizer has {needed} tokens, the embedding {count} rows",
            hint="`--rows` gives them some",
        )
    more = count - change.count
    if more <= 0:
        return replace(change, inputs=change.inputs[:count], outputs=change.outputs[:count])
    row = initial_row(change, vocabulary, init, None)
    inputs, outputs = ([*old, *[own] * more] for old, own in zip((change.inputs, change.outputs), row, strict=True))
    return replace(change, inputs=inputs, outputs=outputs)


def _result(body: Body, change: Change, chance: Chance, evaluate: Evaluate) -> Checkpoint:
    source = body.checkpoint
    config = strict_json.load_object(change.files[CONFIG], f"{body.where}/{CONFIG}", constants=True)
    generation = change.files.get(GENERATION)
    _hold_ids(((f"{CONFIG}: {k}", n) for k, n in named_ids(config)), change.count, body.where, "there would be")
    if generation is not None:
        named = named_ids(strict_json.load_object(generation, f"{body.where}/{GENERATION}"))
        _hold_ids(((f"{GENERATION}: {k}", n) for k, n in named), change.count, body.where, "there would be")
    edited = _with_rows(config, body, change)
    files = {**change.files, CONFIG: written_json(edited).data} if edited != body.config else change.files
    sidecars: dict[str, Sidecar] = {name: file for name, file in source.sidecars.items() if name not in change.left}
    sidecars |= {name: Written(data) for name, data in files.items() if data != source.sidecar(name)}
    made = changed_tensors(body, change, chance, evaluate)
    tensors = {name: made.get(name, tensor) for name, tensor in source.items()}
    is_same = {name: tensors[name] == tensor for name, tensor in source.items()}
    result = replace(
        source,
        tensors=tensors,
        sidecars=sidecars,
        total_size=None,
        content_id=None,
        digests={name: digest for name, digest in source.digests.items() if is_same.get(name)},
        watch=(*source.watch, *body.agreed()),
        warnings=(*source.warnings, *_notes(change)),
        done=(*source.done, *change.done, *_on_rows(body, change, is_same)),
    )
    return held_to_class(result, source)


def _with_rows(config: Mapping[str, Any], body: Body, change: Change) -> dict[str, Any]:
    """config.json with the number of rows, wherever it says that."""
    per_layer = per_layer_rows(body, change)

    def edit(part: Mapping[str, Any]) -> Mapping[str, Any]:
        counts = {key: change.count for key in ROW_KEYS if part.get(key) is not None}
        if per_layer is not None and part.get(PER_LAYER_KEY) is not None:
            counts[PER_LAYER_KEY] = per_layer
        return {**part, **counts}

    edited = with_parts(config, edit)
    ways = [way for way, _ in text_parts(edited)]
    if change.count != body.rows and not any("vocab_size" in part for _, part in text_parts(edited)):
        key = ways[-1].partition(".")[0]
        if key:
            edited[key] = {**edited[key], "vocab_size": change.count}
        else:
            edited["vocab_size"] = change.count
    return edited


def _on_rows(body: Body, change: Change, is_same: Mapping[str, bool]) -> list[str]:
    """What becomes of the matrices that change."""
    names = [each.name for each in body.tensors if not is_same[each.name]]
    if not names:
        return []
    heads, inputs = described(change.outputs), described(change.inputs)
    rows = inputs if heads == inputs else f"{inputs}; of heads {heads}"
    return [f"{listed(names)}: {body.rows} rows become {change.count}: {rows}"]


def _notes(change: Change) -> list[str]:
    zeros = ["rows of zeros in a head give their tokens the logit 0, which may be the largest"]
    return [*change.notes, *(zeros if "zero" in change.outputs else ())]


def _hold_ids(named: Any, rows: int, where: str, what: str) -> None:
    beyond = next(((key, number) for key, number in named if number >= rows), None)
    if beyond is not None:
        key, number = beyond
        raise IncompatibleInputs(
            f"{where}: {escape(key)} is {number}, a token without a row: {what} {rows} rows",
            hint="correct it in the file, or give it a row with `weightops vocab --rows`",
        )
