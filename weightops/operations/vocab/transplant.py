"""Transplant: a model with the tokenizer of another, whose tokens get the model's own rows or are made of them.

Tokens that mean the same in both keep their rows. Of others a row is made by one of five methods: as
mergekit-tokensurgeon 0.1.5 makes them (zero, mean, subword, omp), or as people do for draft models
(jukofyork/transplant-vocab): the input is the last piece of the token's text, and in the head each piece counts half of
the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from weightops.checkpoint import written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.sidecars import is_tokenizer_file
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.token_ids import ROLES, named_ids, renamed_ids, text_parts, with_parts
from weightops.layouts.tokenizers.files import CONFIG, GENERATION
from weightops.layouts.tokenizers.meaning import Meanings, read_meanings
from weightops.operations.vocab.body import Body
from weightops.operations.vocab.change import After, Change, Row, mixed
from weightops.ops.pursuit import NOTHING

Method = Literal["subword", "mean", "zero", "omp", "draft"]
_DECAY = 0.5
"""What a piece counts in the head of a draft model, of what the piece before it counts."""
_BOS, _EOS, _PAD = "bos_token_id", "eos_token_id", "pad_token_id"
_PER_MINUTE = 1e12
"""Multiplications that a core makes in a minute, with the passes over the donor's rows."""
_LONG_MINUTES = 10


def transplanted(body: Body, donor: Body, method: Method, k: int, override: Mapping[str, str]) -> Change:
    """The model with the donor's tokens and their ids, templates and ends.

    `override` has texts by tokens of the donor, which are made of the pieces of that text, whatever else they are.
    Raises `UsageError` for what cannot be meant, `IncompatibleInputs` where a file names a token that goes.
    """
    own, new = read_meanings(body.vocabulary), read_meanings(donor.vocabulary)
    same, beyond = _same(own, new, body.rows)
    if beyond:
        raise IncompatibleInputs(
            f"{body.where}: {len(beyond)} tokens have no row, {listed(beyond, 3)}: the embedding has {body.rows} rows",
            hint="`weightops vocab --rows` gives them some",
        )
    count = max(donor.vocabulary.count, len(donor.vocabulary.ids))
    inputs: list[Row] = [same.get(number, "zero") for number in range(count)]
    outputs = list(inputs)
    empty: list[str] = []
    rows = range(body.rows)
    rules: Mapping[str, Row] = {"zero": "zero", "mean": "mean", "omp": "donor"}
    for text, number in donor.vocabulary.ids.items():
        given = _override(override, text, own) if text in override else None
        if number in same and given is None:
            continue
        if method in rules:
            inputs[number] = outputs[number] = rules[method]
            continue
        pieces = given if given is not None else own.split(new.text(text))
        pieces = [piece for piece in pieces if piece < body.rows]
        if not pieces:
            empty.append(text)
            inputs[number] = outputs[number] = "mean"
        elif method == "draft":
            inputs[number] = pieces[-1]
            outputs[number] = _halved(rows, pieces)
        else:
            inputs[number] = outputs[number] = _mean(rows, pieces)
    odd = next((text for text in override if text not in donor.vocabulary.ids), None)
    if odd is not None:
        raise UsageError(
            f"{donor.where}: {escape(odd)} is no token, and its row is to be another", hint="--override TOKEN TEXT"
        )
    n_new = len(donor.vocabulary.ids) - len(same)
    done = (f"{len(same)} of {len(donor.vocabulary.ids)} tokens of {donor.where} are tokens of {body.where} too",)
    notes: list[str] = []
    if empty:
        notes.append(f"{len(empty)} tokens have no text to be made of, and get the mean row: {listed(empty, 3)}")
    if method == "draft" and body.head is body.embedding:
        notes.append(
            "one matrix is embedding and head, and gets the rows of an embedding; see `weightops shard --untie`"
        )
    after = _after(body, donor, inputs, same, k) if method == "omp" and n_new else None
    if after is not None:
        notes.append(_cost(body, donor, n_new, after))
    files, more = _files(body, donor, same)
    left = tuple(name for name in body.checkpoint.sidecars if is_tokenizer_file(name) and name not in files)
    return Change(inputs, outputs, files, left, (*notes, *more), done, after=after)


def _same(own: Meanings, new: Meanings, rows: int) -> tuple[dict[int, int], list[str]]:
    """By id of the donor that of the model's token of the same meaning; and tokens that it has no row for."""
    same: dict[int, int] = {}
    beyond = []
    for text, number in new.vocabulary.ids.items():
        found = next((own.by_key[key] for key in new.keys(text) if key in own.by_key), None)
        if found is not None and found < rows:
            same[number] = found
        elif found is not None:
            beyond.append(text)
    return same, beyond


def _override(override: Mapping[str, str], text: str, own: Meanings) -> list[int]:
    pieces = own.encode(override[text])
    if not pieces:
        raise UsageError(f"{escape(text)} is to be made of a text without tokens", hint="--override TOKEN TEXT")
    return pieces


def _mean(rows: Sequence[Row], pieces: Sequence[int]) -> Row:
    found = mixed(rows, pieces, [1 / len(pieces)] * len(pieces))
    assert found is not None
    return found


def _halved(rows: Sequence[Row], pieces: Sequence[int]) -> Row:
    weights = [_DECAY**i for i in range(len(pieces))]
    found = mixed(rows, pieces, [weight / sum(weights) for weight in weights])
    assert found is not None
    return found


def _after(body: Body, donor: Body, inputs: Sequence[Row], same: Mapping[int, int], k: int) -> After:
    """Where the rows of new tokens are to be approximated; raises `UsageError` for what has no such solution."""
    common = sorted((number, row) for number, row in same.items() if number < donor.rows)
    width = min(donor.embedding.tensor.spec.shape[1], donor.head.tensor.spec.shape[1])
    if not 0 < k <= len(common) or k >= width:
        raise UsageError(
            f"k is {k}, expected 1 to {min(width - 1, len(common))}: {len(common)} tokens are common, and "
            f"rows of {donor.where} are {width} wide",
            hint="--k says of how many common rows each new one is made",
        )
    beyond = [text for text, number in donor.vocabulary.ids.items() if number >= donor.rows and number not in same]
    if beyond:
        raise IncompatibleInputs(
            f"{donor.where}: {len(beyond)} tokens have no row, {listed(beyond, 3)}: there are {donor.rows} rows",
            hint="take another --method than omp, which needs none of the donor's rows",
        )
    known = set(donor.vocabulary.ids.values())
    rows = [same.get(i, NOTHING - 1 - i if i in known else NOTHING) for i in range(len(inputs))]
    return After(donor, tuple(rows), tuple(common), k)


def _cost(body: Body, donor: Body, n_new: int, after: After) -> str:
    matrices = sum(each.holds in ("input", "output") for each in body.tensors)
    width = donor.embedding.tensor.spec.shape[1]
    count = matrices * n_new * len(after.common) * after.k * width
    said = f"omp: {n_new} rows of {after.k} of {len(after.common)} common ones: about {count:.2g} multiplications"
    held = "the common rows are read in passes, and none are held"
    minutes = count / _PER_MINUTE
    long = f"; that takes a core some {minutes:.0f} minutes: a smaller --k or --method subword is faster"
    return f"{said}; {held}" + (long if minutes > _LONG_MINUTES else "")


def _files(body: Body, donor: Body, same: Mapping[int, int]) -> tuple[dict[str, bytes], list[str]]:
    """The donor's tokenizer and templates, with the model's settings naming the donor's tokens."""
    files = {name: data for name, data in donor.files.items() if is_tokenizer_file(name)}
    notes: list[str] = []
    ids = {f"{role}_token_id": _stated(donor, role) for role in ROLES}
    files[CONFIG] = _with_ids(body, donor, CONFIG, body.config, same, ids, notes)
    if GENERATION in body.files or GENERATION in donor.files:
        ends = donor.document(GENERATION).get(_EOS)
        ids |= {_EOS: ends} if ends is not None else {}
        files[GENERATION] = _with_ids(body, donor, GENERATION, body.document(GENERATION), same, ids, notes)
    return files, notes


def _with_ids(
    body: Body,
    donor: Body,
    name: str,
    document: Mapping[str, Any],
    same: Mapping[int, int],
    ids: Mapping[str, Any],
    notes: list[str],
) -> bytes:
    """A config of the model whose special tokens have the `ids` of the donor's, and others those of the same tokens."""
    own = {row: number for number, row in same.items()}

    def without_roles(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in part.items() if key not in ids}

    gone = [(way, number) for way, number in named_ids(with_parts(document, without_roles)) if number not in own]
    alone = next((way for way, _ in gone if isinstance(_at(document, way), int)), None)
    if alone is not None:
        raise IncompatibleInputs(
            f"{body.where}/{name}: {escape(alone)} is a token that {donor.where} does not have",
            hint="take it out of the file first, if the model can do without",
        )
    if gone:
        notes.append(f"{name}: tokens that {donor.where} lacks are left out of {listed({way for way, _ in gone})}")

    def with_roles(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: ids.get(key, value) for key, value in part.items()}

    made = with_parts(renamed_ids(document, own.get), with_roles)
    there = {key for _, part in text_parts(document) for key in part}
    more = {key: ids[key] for key in (_BOS, _EOS, _PAD) if key not in there and ids[key] is not None}
    return written_json(made | more).data


def _stated(donor: Body, role: str) -> Any:
    """The id of a special token as the donor's config.json has it, or else by its text; None where it has none."""
    stated = [part.get(f"{role}_token_id") for _, part in text_parts(donor.config)]
    found = next((value for value in stated if value is not None), None)
    text = donor.vocabulary.roles.get(role)
    return donor.vocabulary.ids[text] if found is None and text is not None else found


def _at(document: Mapping[str, Any], way: str) -> Any:
    for key in way.split("."):
        document = document[key]
    return document
