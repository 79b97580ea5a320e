"""Text of tokens as they come: what the tokenizer's own decode makes of all of them, given out piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
"""What tokenizers call the tokens that they spell with what they have no token for."""
_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so at most the tokens that share in one."""
_MANY = 4 * _LONGEST_CHARACTER
"""With so many tokens waiting, what they end in is no character that is being spelt."""


class Pieces:
    """The text of tokens after a prompt: joined, what decoding all has more than decoding the prompt.

    A piece is given out once no later token changes it. That is where a character is complete, and where a run of byte
    tokens (`<0xE4>`) has ended: a decoder makes replacement characters of a whole run that is no UTF-8. Special tokens
    have no text. Takes time in proportion to the tokens.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._unseen, self._byte_tokens = _special(tokenizer), _byte_tokens(tokenizer)
        # What was given out last, as what is written depends on it (a space before a word, say); and what waits.
        self._context = [token for token in prompt if token not in self._unseen]
        self._waiting: list[int] = []
        self._tidying = _Tidying(tokenizer) if _tidies(tokenizer) else None

    def push(self, token: int) -> str:
        """What may be given out with this token; empty while all that is new may change."""
        piece = self._ready(token)
        return piece if self._tidying is None else self._tidying.push(piece)

    def end(self) -> str:
        """The rest, once no more tokens come; characters that are not complete are replacement characters."""
        piece = _after(self._text(self._context), self._text(self._context + self._waiting))
        self._waiting = []
        return piece if self._tidying is None else self._tidying.push(piece) + self._tidying.end()

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _ready(self, token: int) -> str:
        if token in self._unseen:
            return ""
        context, waiting = self._context, self._waiting
        waiting.append(token)
        if token in self._byte_tokens:
            return ""
        now = self._text(context + waiting)
        if not self._tokenizer.is_fast:
            # Written in Python, they may do anything: CTRL's takes the `@@ ` out that stands between two tokens.
            ready = len(waiting) - 1
            if not now.startswith(self._text(context + waiting[:ready])):
                return ""
        elif not now.endswith(_REPLACEMENT):
            ready = len(waiting)
        elif len(waiting) >= _MANY:
            ready = _complete(self._text, context, waiting, now)
        else:
            return ""
        piece = _after(self._text(context), self._text(context + waiting[:ready]))
        if piece:
            self._context, self._waiting = waiting[:ready], waiting[ready:]
        return piece


def pieces(tokenizer: Any, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The pieces of `tokens` after `prompt`, none of them empty; see `Pieces`."""
    found = Pieces(tokenizer, prompt)
    for token in tokens:
        piece = found.push(token)
        if piece:
            yield piece
    piece = found.end()
    if piece:
        yield piece


def _after(before: str, now: str) -> str:
    """What `now` has more than `before`, which may end within a character."""
    if before.endswith(_REPLACEMENT) and not now.startswith(before):
        before = before.rstrip(_REPLACEMENT)
    return now[len(before) :]


def _complete(text: Any, context: list[int], waiting: list[int], now: str) -> int:
    """How many of the tokens that wait end with a character, or with bytes that make none; all but the last few."""
    most = len(waiting) - _LONGEST_CHARACTER + 1
    tries = range(most, most - _LONGEST_CHARACTER, -1)
    return next((n for n in tries if now.startswith(text(context + waiting[:n]))), most)


def _special(tokenizer: Any) -> frozenset[int]:
    """Tokens that decode leaves out."""
    if not tokenizer.is_fast:
        return frozenset(tokenizer.all_special_ids)
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


def _byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for a byte each."""
    numbers = tokenizer.convert_tokens_to_ids(_BYTES)
    # Of a token that there is not the number is that of the unknown one.
    known = zip(_BYTES, numbers, tokenizer.convert_ids_to_tokens([n or 0 for n in numbers]), strict=True)
    return frozenset(number for token, number, found in known if number is not None and found == token)


def _tidies(tokenizer: Any) -> bool:
    """Whether decode takes spaces before punctuation out; transformers does not for BPE, whatever the setting."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    is_bpe = tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    return not is_bpe or bool(tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output)


class _Tidying:
    """Takes such spaces out of pieces.

    All that is taken out is a space after which something stands, or one after `'`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tidy, self._waiting = tokenizer.clean_up_tokenization, ""

    def push(self, piece: str) -> str:
        self._waiting += piece
        end = max((match.end() for match in re.finditer(r"[^ '](?= )", self._waiting)), default=0)
        ready, self._waiting = self._waiting[:end], self._waiting[end:]
        return str(self._tidy(ready)) if ready else ""

    def end(self) -> str:
        rest, self._waiting = self._waiting, ""
        return str(self._tidy(rest)) if rest else ""
