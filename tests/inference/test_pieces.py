"""Pieces of text are together what the tokenizer's own decode makes of all tokens, wherever tokens cut characters."""

from __future__ import annotations

import functools
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from small_tokenizers import mixed_strings, sentencepiece_model
from speakers import SPECIAL, byte_fallback, fast, speaker_of_chinese
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.ctrl.tokenization_ctrl import CTRLTokenizer
from transformers.models.gpt_sw3.tokenization_gpt_sw3 import GPTSw3Tokenizer

import weightops
from weightops.cli.main import cli, main
from weightops.inference.events import Token
from weightops.inference.generate import Generation
from weightops.inference.pieces import pieces
from weightops.inference.settings import Settings
from weightops.inference.tokens import token_bytes


def unigram() -> Any:
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return fast(models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(), trainer)


def byte_level() -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return fast(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), trainer)


def word_piece(**settings: Any) -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    return fast(model, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), trainer, **settings)


def word_ends() -> Any:
    """As GPT-1's: the last token of a word says so."""
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return fast(model, pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>"), trainer)


def sentencepiece(folder: Path) -> Any:
    """One of those that transformers has in Python."""
    (folder / "spiece.model").write_bytes(sentencepiece_model())
    return GPTSw3Tokenizer(str(folder / "spiece.model"))


def at_signs(folder: Path) -> Any:
    """Another: `@@ ` between two tokens is taken out."""
    words = ["a@@", "b@@", "c", "d", "a", "<unk>", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version\na b</w>\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<unk>")


KINDS: dict[str, Callable[[], Any]] = {
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "byte-level": byte_level,
    "WordPiece": word_piece,
    "ends of words": word_ends,
    "WordPiece, tidied": functools.partial(word_piece, clean_up_tokenization_spaces=True),
}
IN_PYTHON: dict[str, Callable[[Path], Any]] = {"sentencepiece": sentencepiece, "at signs": at_signs}


@pytest.fixture(scope="module", params=[*KINDS, *IN_PYTHON])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind = request.param
    return KINDS[kind]() if kind in KINDS else IN_PYTHON[kind](tmp_path_factory.mktemp("tokenizer"))


def decoded(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """What a text with `tokens` has more than the prompt."""
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    return str(whole[len(tokenizer.decode(prompt, skip_special_tokens=True)) :])


def check(tokenizer: Any, texts: tuple[str, ...]) -> None:
    chance = random.Random(3)
    for text in texts:
        prompt = tokenizer(chance.choice(["", "once upon", "张量", "it's 12"]), add_special_tokens=False).input_ids
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        cut = tokens[: chance.randrange(len(tokens) + 1)]
        any_ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(30))]
        for given in (tokens, cut, any_ids):
            assert "".join(pieces(tokenizer, prompt, iter(given))) == decoded(tokenizer, prompt, given), repr(text)


def test_mixed_texts_texts_that_end_anywhere_and_any_tokens(tokenizer: Any) -> None:
    check(tokenizer, mixed_strings(120))


@pytest.mark.slow
def test_three_thousand_mixed_texts(tokenizer: Any) -> None:
    check(tokenizer, mixed_strings(3000))


def through_the_command(tokenizer: Any, texts: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stdout and JSON hold of a model that says each text, is its decode."""
    prompt = tokenizer("once upon", add_special_tokens=False).input_ids

    class Said(SimpleNamespace):
        to_json = Generation.to_json

        def __iter__(self) -> Any:
            return pieces(tokenizer, prompt, self.tokens)

    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        facts = {
            "warnings": (),
            "streams_weights": False,
            "saves_memory": False,
            "engine": None,
            "finish": "eos",
            "logprobs": (),
        }
        said = Said(tokens=tokens, prompt_tokens=prompt, **facts)
        monkeypatch.setattr(weightops, "generate", lambda *_, said=said, **__: said)
        expected = decoded(tokenizer, prompt, tokens)
        line = ["generate", str(folder), "--prompt", "x"]
        assert CliRunner().invoke(cli, line).stdout_bytes.decode() == expected + "\n"
        done = CliRunner().invoke(cli, [*line, "--json"])
        assert done.exception is None, done.exception
        assert json.loads(done.stdout_bytes)["text"] == expected


def test_texts_through_stdout_and_json(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through_the_command(tokenizer, mixed_strings(40), tmp_path, monkeypatch)


@pytest.mark.slow
def test_three_thousand_through_stdout_and_json(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_the_command(tokenizer, mixed_strings(3000), tmp_path, monkeypatch)


def test_pieces_come_as_soon_as_no_token_changes_them() -> None:
    tokenizer = byte_level()
    text = "weights 世界 🚀!"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    found = list(pieces(tokenizer, [], iter(tokens)))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)
    assert {"世", "界"} <= {piece.strip() for piece in found}
    taken: list[int] = []

    def watched() -> Any:
        for token in tokens:
            taken.append(token)
            yield token

    stream = pieces(tokenizer, [], watched())
    for piece in stream:
        assert tokenizer.decode(taken).endswith(piece)


def test_a_prompt_may_end_within_a_character() -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        tokens = tokenizer("a世b", add_special_tokens=False).input_ids
        for cut in range(len(tokens)):
            said = tokenizer.decode(tokens[:cut]).rstrip("\ufffd")
            assert said + "".join(pieces(tokenizer, tokens[:cut], tokens[cut:])) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "unigram"])
def test_bytes_of_tokens_are_together_those_of_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for text in mixed_strings(80):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if tokenizer.unk_token_id in tokens or "\u2581" in text or "<0x" in text or "<|" in text:
            continue
        said = b"".join(token_bytes(tokenizer, token) for token in tokens)
        assert said.decode().strip(" ") == tokenizer.decode(tokens).strip(" ")


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.count = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.count += len(ids)
        return str(self._tokenizer.decode(ids, **options))


@pytest.mark.parametrize("token", ["a", "Ġ", "ä", "</s>", "½"])
def test_it_decodes_in_proportion_to_the_tokens(token: str) -> None:
    counting = Counting(byte_level())
    (number,) = counting.convert_tokens_to_ids([token])
    tokens = [number] * 3000
    assert "".join(pieces(counting, [number], tokens)) == decoded(counting._tokenizer, [number], tokens)
    assert counting.count < 60 * len(tokens)
    counting = Counting(byte_fallback())
    tokens = counting.convert_tokens_to_ids(["<0xE4>", "<0xB8>", "<0x96>"]) * 1000
    assert "".join(pieces(counting, [], tokens)) == "世" * 1000
    assert counting.count < 3 * len(tokens)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    folder = tmp_path_factory.mktemp("speaker")
    return folder, speaker_of_chinese(folder)


@pytest.mark.parametrize("count", [None, 3, 4, 5, 7])
def test_json_and_stdout_are_the_text_of_transformers(chinese: tuple[Path, list[int]], count: int | None) -> None:
    folder, said = chinese
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompt = tokenizer("一", return_tensors="pt", return_token_type_ids=False)
    out = AutoModelForCausalLM.from_pretrained(folder).generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        do_sample=False,
        max_new_tokens=count or 40,
        pad_token_id=0,
    )
    expected = decoded(tokenizer, prompt.input_ids[0].tolist(), out[0, prompt.input_ids.shape[1] :].tolist())
    limit = ["--max-new-tokens", str(count)] if count else []
    found = CliRunner().invoke(cli, ["generate", str(folder), "--prompt", "一", *limit])
    assert found.stdout == expected + "\n"
    document = json.loads(CliRunner().invoke(cli, ["generate", str(folder), "--prompt", "一", "--json", *limit]).stdout)
    assert document["text"] == expected
    assert document["tokens"] == said[:count]


def test_events_never_hold_half_a_character(chinese: tuple[Path, list[int]]) -> None:
    """Nor does a stop string end within one, or leave a part of itself."""
    folder, _ = chinese
    for stop, expected in ((), "偂惄煆t"), (("煆",), "偂惄"), (("惄煆t",), "偂"), (("惄x",), "偂惄煆t"):
        found = Generation(weightops.open_checkpoint(folder), "一", settings=Settings(stop=stop))
        said = [event.text for event in found.events() if isinstance(event, Token)]
        assert "".join(said) == expected
        assert not any("\ufffd" in text for text in said)


@pytest.mark.parametrize(("encoding", "expected"), [("gb18030", "偂惄煆t\n"), ("latin-1", "\\u5042\\u60c4\\u7146t\n")])
def test_through_stdout_of_other_encodings(
    chinese: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str
) -> None:
    folder, _ = chinese
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    with pytest.raises(SystemExit, match="0"):
        main(["generate", str(folder), "--prompt", "一"])
    assert written.getvalue().decode(encoding) == expected
