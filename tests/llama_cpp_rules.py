"""What llama.cpp's converter makes of the tokenizer in a folder: by the libraries that it uses, in its order.

Its own code is not published as a package; gguf's SpecialVocab and LlamaHfVocab, sentencepiece and transformers are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
from gguf.vocab import LlamaHfVocab
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

Tokens = list[tuple[str, float, int]]
UNUSED, CONTROL, USER_DEFINED, NORMAL = 5, 3, 4, 1


def tokenizer_fields(folder: Path, rows: int, pre: str) -> dict[str, Any]:
    """The `tokenizer.` keys; `pre` is the name for byte-level BPE, which hangs on published vocabularies."""
    writer = gguf.GGUFWriter(None, "llama")
    config = _json(folder / "tokenizer_config.json")
    if config.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(config["add_prefix_space"])
    if (folder / "tokenizer.model").is_file():
        _write(writer, "llama", "default", _of_sentencepiece(folder, rows))
        special = _special(folder, n_vocab=rows)
    else:
        try:
            tokens = [(text.decode(), score, int(kind)) for text, score, kind in LlamaHfVocab(folder).all_tokens()]
            _write(writer, "llama", "default", _padded(tokens, rows))
            special = _special(folder, n_vocab=rows)
        except (FileNotFoundError, TypeError):
            _write(writer, "gpt2", pre, _of_bytes(folder, rows))
            special = _special(folder, load_merges=True)
    special.add_to_gguf(writer, quiet=True)
    if rows == 32016:  # Code Llama
        special = gguf.SpecialVocab(folder, special_token_types=["prefix", "suffix", "middle", "eot"])
        for kind, number in (("prefix", 32007), ("suffix", 32008), ("middle", 32009), ("eot", 32010)):
            special._set_special_token(kind, number)
        special.add_to_gguf(writer, quiet=True)
    if rows == 49152:  # Granite
        writer.add_add_bos_token(False)
    kept = {key: value.value for shard in writer.kv_data for key, value in shard.items()}
    return {key: value for key, value in kept.items() if key.startswith("tokenizer.")}


def _special(folder: Path, **asked: Any) -> gguf.SpecialVocab:
    """gguf's own, with what changed after its 0.19: the post-processor goes before tokenizer_config.json."""
    config = _json(folder / "tokenizer_config.json")
    flags = {name: config.pop(f"add_{name}_token", None) for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    top = _json(folder / "tokenizer.json").get("post_processor") or {}
    levels = any(each.get("type") == "ByteLevel" for each in top.get("processors", [top]))
    with tempfile.TemporaryDirectory() as without:
        shutil.copytree(folder, without, dirs_exist_ok=True)
        if config:
            (Path(without) / "tokenizer_config.json").write_text(json.dumps(config))
        found = gguf.SpecialVocab(without, **asked)
    found.add_special_token = {
        **({"bos": False, "eos": False} if levels else {}),
        **found.add_special_token,
        **{name: flag for name, flag in flags.items() if flag is not None and name not in found.add_special_token},
    }
    return found


def _write(writer: gguf.GGUFWriter, model: str, pre: str, tokens: Tokens) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _, _ in tokens])
    if model == "llama":
        writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])


def _padded(tokens: Tokens, rows: int) -> Tokens:
    return tokens + [(f"[PAD{i}]", -10000.0, UNUSED) for i in range(len(tokens), rows)]


def _of_sentencepiece(folder: Path, rows: int) -> Tokens:
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = []
    for i in range(model.vocab_size()):
        asked = (model.IsUnknown, model.IsControl, model.IsUnused, model.IsByte)
        kind = next((kind for kind, ask in zip((2, 3, 5, 6), asked, strict=True) if ask(i)), NORMAL)
        tokens.append((model.IdToPiece(i), model.GetScore(i), kind))
    tokens = _padded(tokens, rows)
    for text, i in _json(folder / "added_tokens.json").items():
        if i < rows:
            tokens[i] = (text, -1000.0, USER_DEFINED)
    for key, token in _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        if int(key) < rows and (token.get("special") or _looks_special(token["content"])):
            tokens[int(key)] = (token["content"], -1000.0, CONTROL)
        elif int(key) < rows:
            tokens[int(key)] = (token["content"].replace("\u2581", " "), -1000.0, USER_DEFINED)
    return tokens


def _of_bytes(folder: Path, rows: int) -> Tokens:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_id = {i: text for text, i in tokenizer.vocab.items()}
    decoder = tokenizer.added_tokens_decoder
    assert max(by_id) < rows
    tokens = []
    for i in range(rows):
        if i not in by_id:
            tokens.append((f"[PAD{i}]", 0.0, UNUSED))
        elif i not in decoder:
            tokens.append((by_id[i], 0.0, NORMAL))
        else:
            text = by_id[i]
            if not decoder[i].normalized:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            special = decoder[i].special or _looks_special(text)
            tokens.append((text, 0.0, CONTROL) if special else (text.replace("\u2581", " "), 0.0, USER_DEFINED))
    return tokens


def _looks_special(text: str) -> bool:
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    named = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return named or any(text.startswith(left) and text.endswith(right) for left, right in brackets)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
