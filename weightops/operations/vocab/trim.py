"""Trim: the tokens that a corpus needs, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightops.checkpoint import written_json
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError
from weightops.formats.sidecars import Kind, kind_of
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.token_ids import ids_elsewhere, processor_ids, renamed_ids
from weightops.layouts.tokenizers import needed
from weightops.layouts.tokenizers.files import CONFIG, GENERATION, TOKENIZER
from weightops.layouts.tokenizers.vocabulary import FolderVocabulary, read_vocabulary
from weightops.operations.vocab.body import Body
from weightops.operations.vocab.change import Change

_CHUNK = 1 << 14
"""Characters of a corpus that are cut together, lines and what is between them."""
_LONGEST = 1 << 22
"""Characters of a line that are held at once."""


@dataclass(frozen=True)
class Corpus:
    """The texts of a file, as often as they are wanted: each line by itself, and several as they stand there."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        lines: list[str] = []
        count = 0
        with self.path.open(encoding="utf-8", newline="") as file:
            try:
                while line := file.readline(_LONGEST):
                    yield line.rstrip("\r\n")
                    lines.append(line)
                    count += len(line)
                    if count > _CHUNK:
                        yield "".join(lines)
                        lines, count = [], 0
            except UnicodeDecodeError as error:
                raise CorruptInput(
                    f"{escape(str(self.path))}: not UTF-8 ({error.reason})", hint="convert it to UTF-8"
                ) from None
        if lines:
            yield "".join(lines)


def read_corpus(path: str | os.PathLike[str]) -> Corpus:
    """The corpus in a file of text; raises `SourceMissing` or `UsageError` if there is none."""
    file = Path(path)
    if not file.is_file():
        raise SourceMissing(f"{escape(str(file))}: no such file", hint="--trim names a file of text")
    if not any(text.strip() for text in Corpus(file)):
        raise UsageError(
            f"{escape(str(file))}: holds no text, and the vocabulary is to be cut to what it needs",
            hint="name a file of text such as the model is to read",
        )
    return Corpus(file)


def trimmed(body: Body, corpus: Corpus) -> Change:
    """The vocabulary cut to what the corpus needs; see `weightops.layouts.tokenizers.needed` for what that is.

    Tokens keep their order, and their ids close up. What is added, special, or named by its id in some file stays.
    The corpus is cut once more with the new tokenizer, and has to come out as before. Raises `IncompatibleInputs` for
    tokens to be kept that have no row.
    """
    vocabulary = read_vocabulary(body.files, body.where)
    used, cuts = vocabulary.needed(corpus)
    kept = used | vocabulary.added.keys() | set(vocabulary.roles.values())
    ids = {vocabulary.ids[text] for text in kept} | _of_processors(vocabulary)
    beyond = sorted(text for text in kept if vocabulary.ids[text] >= body.rows)
    if beyond:
        raise IncompatibleInputs(
            f"{body.where}: {len(beyond)} tokens that are kept have no row, {listed(beyond, 3)}: the embedding has "
            f"{body.rows} rows",
            hint="`weightops vocab --rows` gives them some",
        )
    named = {number for _, number in body.named()}
    texts = set(vocabulary.ids.values())
    order = sorted((ids | named) & texts) + sorted(named - texts)
    new = {old: i for i, old in enumerate(order)}
    files = vocabulary.keeping(new)
    files[CONFIG] = written_json(renamed_ids(body.config, new.get)).data
    for name in body.files:
        if name == GENERATION or kind_of(name) is Kind.PROCESSOR:
            files[name] = written_json(renamed_ids(body.document(name), new.get)).data
    done = (f"{len(order) - len(named - texts)} of {len(vocabulary.ids)} tokens are kept",)
    notes = [f"left out, as it holds the old tokens: {escape(name)}" for name in vocabulary.left]
    left, ids_of = vocabulary.left, {text: new[n] for text, n in vocabulary.ids.items() if n in new}
    del vocabulary  # large ones take as much memory as the new one does, when it is read
    _prove(body, files, ids_of, corpus, cuts)
    elsewhere = ids_elsewhere(body.config)
    notes += [f"config.json: ids of other parts stay as they are: {listed(elsewhere)}"] if elsewhere else []
    return Change(order, order, files, left, tuple(notes), done)


def _of_processors(vocabulary: FolderVocabulary) -> set[int]:
    """The ids that a tokenizer puts around texts."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    processor_ids((vocabulary.document or {}).get("post_processor"), note)
    return found


def _prove(
    body: Body, files: Mapping[str, bytes], ids: Mapping[str, int], corpus: Corpus, cuts: Mapping[str, str]
) -> None:
    """Cut the corpus with the new files too; raises `IncompatibleInputs` where that comes out otherwise, or ids do."""
    for name, digest in cuts.items():
        found = needed.Cuts()
        if name == TOKENIZER:
            after = needed.opened(files[name], body.where)
            if after.get_vocab() != ids:
                raise IncompatibleInputs(f"{body.where}: the ids of {TOKENIZER} have gaps that cannot be closed")
            texts = needed.encoded(after, corpus)
        else:
            texts = needed.encoded_pieces(files[name], corpus)
        for tokens in texts:
            found.add(tokens)
        if found.digest != digest:
            raise IncompatibleInputs(
                f"{body.where}/{escape(name)}: with fewer tokens the corpus would be split otherwise",
                hint="this tokenizer is of a kind that cannot be trimmed yet; please report it",
            )
