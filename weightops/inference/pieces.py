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


def pieces(tokenizer: Any, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` after `prompt`: joined, what decoding all has more than decoding the prompt.

    A piece is given out once no later token changes it. That is where a character is complete, and where a run of byte
    tokens (`<0xE4>`) has ended: a decoder makes replacement characters of a whole run that is no UTF-8. Special tokens
    have no text. Takes time in proportion to the tokens.
    """
    found = _pieces(tokenizer, prompt, tokens)
    return _tidied(tokenizer, found) if _tidies(tokenizer) else found


def _pieces(tokenizer: Any, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    unseen, byte_tokens = _special(tokenizer), _byte_tokens(tokenizer)
    # What was given out last, as what is written depends on it (a space before a word, say); and what waits.
    context = [token for token in prompt if token not in unseen]
    waiting: list[int] = []

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    for token in tokens:
        if token in unseen:
            continue
        waiting.append(token)
        if token in byte_tokens:
            continue
        now = text(context + waiting)
        if not tokenizer.is_fast:
            # Written in Python, they may do anything: CTRL's takes the `@@ ` out that stands between two tokens.
            ready = len(waiting) - 1
            if not now.startswith(text(context + waiting[:ready])):
                continue
        elif not now.endswith(_REPLACEMENT):
            ready = len(waiting)
        elif len(waiting) >= _MANY:
            ready = _complete(text, context, waiting, now)
        else:
            continue
        piece = _after(text(context), text(context + waiting[:ready]))
        if piece:
            yield piece
            context, waiting = waiting[:ready], waiting[ready:]
    piece = _after(text(context), text(context + waiting))
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


def _tidied(tokenizer: Any, found: Iterator[str]) -> Iterator[str]:
    """Pieces without such spaces. All that is taken out is a space after which something stands, or one after `'`."""
    waiting = ""
    for piece in found:
        waiting += piece
        end = max((match.end() for match in re.finditer(r"[^ '](?= )", waiting)), default=0)
        if end:
            yield tokenizer.clean_up_tokenization(waiting[:end])
            waiting = waiting[end:]
    if waiting:
        yield tokenizer.clean_up_tokenization(waiting)
