"""Small tokenizers trained as LLaMA's were, on text made here, and strings to hold them against their references."""

from __future__ import annotations

import base64
import functools
import io
import random
import struct
from collections.abc import Iterable

import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from weightops.layouts.tokenizers.ranks import PATTERN

CODE = (
    "def read(path: str) -> bytes:\n    with open(path, 'rb') as file:\n        return file.read()\n",
    "for (int i = 0; i < 128; ++i) {\n\tsum += weights[i] * x[i];\r\n\tif (sum != sum) break;\n}\n",
    'print(f"{name:>24}  {size / 1e9:8.3f} GB")  # 100%\n',
)
CHINESE = "流式读取模型权重、逐个张量校验。词表由三万二千个词片组成。我们不改变任何一个比特、也不猜测。"
EMOJI = "🙂🚀👩‍💻🇨🇳❤️👍🏽"
RARE = "ẞ\u0e01\u0e33ǆ\u202e\U0001d518𐍈\u0301ꙮ\ufeff﷽\x7f\x00\x85\u00a0\u2028\u3000\u2581\u017f½²Ⅷ"


def _words(chance: random.Random, count: int) -> list[str]:
    syllables = ["ten", "sor", "de", "ta", "mer", "ging", "the", "un", "lo", "ad", "stream", "ly", "é", "wei", "ght"]
    return ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(count)]


@functools.cache
def training_text() -> tuple[str, ...]:
    """About 3,000 lines of words, code, Chinese and emoji, the same on every call."""
    chance = random.Random(1)
    words = _words(chance, 800)
    lines = []
    for _ in range(1000):
        lines.append(" ".join(chance.choices(words, k=9)).capitalize() + f", and it's {chance.randint(0, 99999)}.")
        lines.append(chance.choice(CODE).strip("\n") + "  " * chance.randint(0, 9) + chance.choice(EMOJI))
        start = chance.randrange(len(CHINESE))
        lines.append(CHINESE[start : start + chance.randint(2, 12)])
    return tuple(lines)


@functools.cache
def sentencepiece_model(**changed: object) -> bytes:
    """A model with LLaMA's settings but for its size, and for what is changed."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 1500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.999,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()), model_writer=model, **{**settings, **changed}
    )
    return model.getvalue()


def message(*fields: tuple[int, bytes | int | float]) -> bytes:
    """A protobuf message of numbered fields: strings, numbers, and floats of 32 bits."""

    def varint(value: int) -> bytes:
        return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])

    result = b""
    for number, value in fields:
        match value:
            case bytes():
                result += varint(number << 3 | 2) + varint(len(value)) + value
            case int():
                result += varint(number << 3) + varint(value)
            case float():
                result += varint(number << 3 | 5) + struct.pack("<f", value)
    return result


def piece(text: str | bytes, kind: int = 1, score: float = 0.0) -> tuple[int, bytes]:
    """A piece of a model."""
    return 1, message((1, text if isinstance(text, bytes) else text.encode()), (2, score), (3, kind))


UNKNOWN, BOS, EOS = piece("<unk>", 2), piece("<s>", 3), piece("</s>", 3)
BYTES = tuple(piece(f"<0x{byte:02X}>", 6) for byte in range(256))
TRAINER = (2, message((3, 2), (35, 1)))
"""BPE with byte fallback."""
NORMALIZER = (3, message((4, 0)))
"""Spaces are kept, one is put before a text."""


@functools.cache
def trained_ranks() -> Tokenizer:
    """Byte-level BPE cut by Llama 3's pattern: about 2,600 tokens in the order of their merges, and no special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        training_text(), trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


@functools.cache
def rank_tokens() -> tuple[bytes, ...]:
    """The same tokens as bytes, by rank."""
    unicode = _gpt2_bytes()
    vocabulary = sorted(trained_ranks().get_vocab().items(), key=lambda item: item[1])
    return tuple(bytes(unicode[character] for character in text) for text, _ in vocabulary)


def _gpt2_bytes() -> dict[str, int]:
    """As in GPT-2's encoder.py: characters for bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def render_ranks(tokens: Iterable[bytes]) -> bytes:
    """The file that holds tokens by rank, as tiktoken writes it."""
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


@functools.cache
def mixed_strings(count: int = 1000) -> tuple[str, ...]:
    """Strings of all kinds: spaces and tabs at every place, code, Chinese, emoji, characters that nobody trained on."""
    chance = random.Random(2)
    words = _words(chance, 200)

    def part() -> str:
        match chance.randrange(9):
            case 0:
                return chance.choice([" ", "  ", "\t", "\n", "\r\n", " \n", "\n\n\n", "\t\t"]) * chance.randint(1, 4)
            case 1:
                return chance.choice(CODE)
            case 2:
                start = chance.randrange(len(CHINESE))
                return CHINESE[start : start + chance.randint(1, 9)]
            case 3:
                return chance.choice(EMOJI) + chance.choice(["", EMOJI])
            case 4:
                return "".join(chance.choices(RARE, k=chance.randint(1, 4)))
            case 5:
                return str(chance.randrange(10 ** chance.randint(1, 12))) + chance.choice(["", ".", ",000", "%"])
            case 6:
                return chance.choice(["It's", "WE'LL", "x'D", "<0x41>", "▁▁", "...!!\n", "<|im_start|>", "#version 3"])
            case 7:
                return chr(chance.choice([*range(0x20, 0xD800), *range(0xE000, 0x11000), *range(0x1F300, 0x1FA00)]))
            case _:
                return chance.choice([" ", "", "  "]) + " ".join(chance.choices(words, k=chance.randint(1, 5)))

    edges = ("", " ", "  ", "   a", "a   ", "\n", " \n a", "\t", "▁", " ▁a", "a", "\x00")
    return edges + tuple("".join(part() for _ in range(chance.randint(1, 8))) for _ in range(count - len(edges)))
