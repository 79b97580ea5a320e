"""GGUF files of small models: what gguf's reader finds in them, and what transformers computes from them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece as reference_sentencepiece
import torch
from meta_model import meta_forward, whole_tensors
from small_tokenizers import rank_tokens, render_ranks, sentencepiece_model
from support import evaluate, to_bytes, torch_dtype

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.formats.gguf import gguf_layout
from weightops.formats.layout import Data, Literal
from weightops.layouts import gguf as layout
from weightops.layouts.gguf.write import llama3_factors
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.tokenizers import ranks, sentencepiece
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.tokens import Kind, Token, Tokenizer
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96}
H = Hyperparameters(**SIZES, head_dim=16, vocab_size=0, norm_eps=1e-5, context_length=512)


@functools.cache
def pieces() -> Tokenizer:
    return sentencepiece.parse(sentencepiece_model(), "tokenizer.model")


@functools.cache
def rank_tokenizer() -> Tokenizer:
    return ranks.parse(render_ranks(rank_tokens()), generation="3.1", instruct=True)


def tensors_of(vocab: int, dtype: DType = DType.F32) -> dict[str, torch.Tensor]:
    return dict(whole_tensors(**SIZES, vocab=vocab, dtype=torch_dtype(dtype), rope_freqs=False))


def model(tokenizer: Tokenizer | None, *, rows: int = 0, dtype: DType = DType.F32, **changed: Any) -> Model:
    """A model with random weights; its embedding has `rows`, or as many as there are tokens."""
    vocab = rows or (len(tokenizer.tokens) if tokenizer else 64)
    h = replace(H, vocab_size=vocab, **changed)
    tensors = {
        name: LazyTensor.make(Given(dtype, tuple(tensor.shape), to_bytes(tensor)))
        for name, tensor in tensors_of(vocab, dtype).items()
        if not (h.tied and name == "output.weight")
    }
    return Model(name="Tiny Model", hyperparameters=h, tensors=tensors, tokenizer=tokenizer)


def write(given: Model, dtype: DType | None) -> Checkpoint:
    return layout.write(layout.from_model(given), dtype)


def save(checkpoint: Checkpoint, path: Path) -> Path:
    layout = gguf_layout([(name, tensor.spec) for name, tensor in checkpoint.items()], checkpoint.metadata)

    def parts() -> Iterator[bytes]:
        for piece in layout.pieces:
            assert isinstance(piece, Literal | Data)
            yield piece.data if isinstance(piece, Literal) else evaluate(checkpoint[piece.name])

    path.write_bytes(b"".join(parts()))
    return path


def fields(path: Path) -> dict[str, Any]:
    found = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in found.items() if not key.startswith("GGUF.")}


def tokens_of(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The part of the metadata that is the tokenizer."""
    metadata = write(model(tokenizer, rows=rows), None).metadata
    return {key.rpartition(".")[2]: value for key, value in metadata.items() if key.startswith("tokenizer.")}


def test_keys_and_their_order_are_those_of_the_converter(tmp_path: Path) -> None:
    checkpoint = write(model(pieces(), dtype=DType.BF16, rope_theta=5e5), None)
    found = fields(save(checkpoint, tmp_path / "model.gguf"))
    tokens = pieces().tokens
    parameters = sum(tensor.spec.numel for tensor in checkpoint.values())
    assert list(found.items()) == [
        ("general.architecture", "llama"),
        ("general.type", "model"),
        ("general.name", "Tiny Model"),
        ("general.size_label", gguf.size_label(parameters, parameters, 0, 0)),
        ("llama.block_count", 2),
        ("llama.context_length", 512),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 96),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.freq_base", 5e5),
        ("llama.attention.layer_norm_rms_epsilon", float(np.float32(1e-5))),
        ("llama.attention.key_length", 16),
        ("llama.attention.value_length", 16),
        ("general.file_type", gguf.LlamaFileType.MOSTLY_BF16),
        ("llama.vocab_size", len(tokens)),
        ("llama.rope.dimension_count", 16),
        ("general.quantization_version", gguf.GGML_QUANT_VERSION),
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.pre", "default"),
        ("tokenizer.ggml.tokens", [token.data.decode() for token in tokens]),
        ("tokenizer.ggml.scores", [token.score for token in tokens]),
        ("tokenizer.ggml.token_type", [int(token.kind) for token in tokens]),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.unknown_token_id", 0),
        ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_sep_token", False),
        ("tokenizer.ggml.add_eos_token", False),
    ]


@pytest.mark.parametrize("dtype", [None, DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0])
def test_matrices_take_the_type_and_vectors_stay_float32(tmp_path: Path, dtype: DType | None) -> None:
    path = save(write(model(pieces(), dtype=DType.F16), dtype), tmp_path / "model.gguf")
    stored = dtype or DType.F16
    code = gguf.GGMLQuantizationType[stored.name]
    canonical = {name: tensor.float().numpy() for name, tensor in tensors_of(len(pieces().tokens), DType.F16).items()}
    short = {
        "attn_q": "attention.wq",
        "attn_k": "attention.wk",
        "attn_v": "attention.wv",
        "attn_output": "attention.wo",
    }
    short |= {"ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"}
    short |= {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}
    names = {"token_embd.weight": "tok_embeddings.weight"}
    names |= {f"blk.{n}.{ours}.weight": f"layers.{n}.{metas}.weight" for n in (0, 1) for ours, metas in short.items()}
    names |= {"output_norm.weight": "norm.weight", "output.weight": "output.weight"}
    found = gguf.GGUFReader(path).tensors
    assert [tensor.name for tensor in found] == list(names)
    for tensor in found:
        values = canonical[names[tensor.name]]
        expected = gguf.quants.quantize(values, code) if values.ndim > 1 else values
        assert tensor.tensor_type == (code if values.ndim > 1 else gguf.GGMLQuantizationType.F32)
        assert tensor.data.tobytes() == expected.tobytes()
    kind = {"F32": "ALL_F32"}.get(stored.name, f"MOSTLY_{stored.name}")
    assert fields(path)["general.file_type"] == gguf.LlamaFileType[kind]


def test_ranks_become_byte_level_tokens_with_merges(tmp_path: Path) -> None:
    tokenizer = rank_tokenizer()
    found = fields(save(write(model(tokenizer), None), tmp_path / "model.gguf"))
    count = len(rank_tokens())
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    texts = found["tokenizer.ggml.tokens"]
    assert [ranks.from_unicode(text) for text in texts[:count]] == list(rank_tokens())
    assert texts[count] == "<|begin_of_text|>"
    assert found["tokenizer.ggml.token_type"] == [1] * count + [3] * 256
    left, right = found["tokenizer.ggml.merges"][-1].split(" ")
    assert ranks.from_unicode(left + right) == rank_tokens()[-1]
    assert found["tokenizer.ggml.bos_token_id"] == count
    assert found["tokenizer.ggml.eos_token_id"] == count + 9  # <|eot_id|>
    assert "tokenizer.ggml.scores" not in found


@pytest.mark.parametrize("make", [pieces, rank_tokenizer])
def test_transformers_reads_the_model_and_the_tokenizer(tmp_path: Path, make: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Tokenizer = make()
    save(write(model(tokenizer), None), tmp_path / "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    expected = meta_forward(tensors_of(len(tokenizer.tokens)), {**SIZES, "norm_eps": 1e-5}, ids)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Hello tensor stream", "3 spaces   100%", "\u6d41\u5f0f \U0001f642"):
        made = theirs.encode(text, add_special_tokens=False)
        if tokenizer.kind == "sentencepiece":
            processor = reference_sentencepiece.SentencePieceProcessor(model_proto=tokenizer.data)
            assert made == processor.encode(text)
        else:
            assert b"".join(tokenizer.tokens[i].data for i in made) == text.encode()


def test_rows_beyond_the_tokenizer_get_unused_tokens() -> None:
    count = len(pieces().tokens)
    found = tokens_of(pieces(), count + 2)
    assert found["tokens"]["array"][1][count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert found["scores"]["array"][1][count:] == [-10000.0] * 2
    assert found["token_type"]["array"][1][count:] == [Kind.UNUSED] * 2
    with pytest.raises(UsageError, match=f"{count} tokens, the embedding only {count - 1} rows"):
        tokens_of(pieces(), count - 1)


def test_what_is_unusual_of_a_tokenizer_is_said() -> None:
    tokens = (*pieces().tokens, Token("\u2581<PRE>".encode(), Kind.USER_DEFINED))
    odd = replace(pieces(), tokens=tokens, add_dummy_prefix=False, bos_id=None, eos_ids=(), pad_id=3)
    found = tokens_of(odd, len(tokens))
    assert found["tokens"]["array"][1][-1] == " <PRE>"
    assert next(iter(found.items())) == ("add_space_prefix", {"bool": False})
    assert found["padding_token_id"] == {"uint32": 3}
    assert found["add_bos_token"] == {"bool": False}
    assert not {"bos_token_id", "eos_token_id"} & found.keys()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_are_what_frequencies_are_divided_by(factor: float) -> None:
    checkpoint = write(model(pieces(), rope_scaling=RopeScaling(factor=factor), rope_theta=5e5), None)
    assert next(iter(checkpoint)) == "rope_freqs.weight"
    limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    made = llama3_factors({"factor": factor, "rope_theta": 5e5, **limits}, 128)
    expected = []
    for i in range(64):
        turns = 8192 * 5e5 ** (-2 * i / 128) / (2 * math.pi)  # within the context that it was trained for
        kept = min(max((turns - 1) / (4 - 1), 0), 1)
        expected.append(1 / (kept + (1 - kept) / factor))
    np.testing.assert_allclose(made, expected, rtol=1e-6)
    assert (made[0], made[-1]) == (1, factor)


def test_a_tied_model_has_no_output_and_a_window_is_told_of() -> None:
    checkpoint = write(model(pieces(), tied=True, family="mistral", sliding_window=4096), DType.F16)
    assert "output.weight" not in checkpoint
    assert checkpoint.metadata["general.architecture"] == {"string": "llama"}
    assert ["4096" in warning for warning in checkpoint.warnings] == [True]


def test_the_chat_template_goes_into_the_file() -> None:
    files = TokenizerFiles({"chat_template.jinja": b"{{ messages }}"})
    checkpoint = write(replace(model(pieces()), files=files), None)
    assert checkpoint.metadata["tokenizer.chat_template"] == {"string": "{{ messages }}"}


def test_how_tokens_are_chosen_goes_into_the_file_as_gguf_takes_it(tmp_path: Path) -> None:
    stated = {"temperature": 1, "top_p": 0.9, "top_k": 50, "min_p": None, "repetition_penalty": 1.1, "mirostat": True}
    stated |= {"eos_token_id": [2, 3], "mirostat_tau": 5.0, "sequence": "top_k", "max_new_tokens": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({**stated, "mirostat": None}))
    writer = gguf.GGUFWriter(None, "llama")
    theirs = gguf.Metadata.load(model_path=tmp_path)
    theirs.set_gguf_meta_model(writer)
    expected = {key: value.value for key, value in writer.kv_data[0].items() if "sampling" in key}
    expected["general.sampling.penalty_repeat"] = 1.1  # since gguf 0.19
    files = TokenizerFiles({"generation_config.json": json.dumps(stated).encode()})
    found = write(replace(model(pieces()), files=files), None).metadata
    sampling = {key: value for key, value in found.items() if "sampling" in key}
    assert {key: next(iter(value.values())) for key, value in sampling.items()} == expected
    assert list(found).index("general.name") == 2 + len(expected)
    assert len(expected) == 6


def test_what_llama_cpp_could_not_use_is_refused() -> None:
    with pytest.raises(UsageError, match="no tokenizer") as caught:
        write(model(None), None)
    assert caught.value.hint == "give --tokenizer FILE"
    with pytest.raises(UsageError, match=r"token_embd\.weight: llama\.cpp computes with no float64"):
        write(model(pieces(), dtype=DType.F64), None)
    with pytest.raises(UsageError, match="no float8_e4m3fn"):
        write(model(pieces()), DType.F8_E4M3)
    with pytest.raises(UsageError, match="no file says for how long a context"):
        write(model(pieces(), context_length=None), None)


def test_rows_that_are_no_whole_blocks_stay_in_float16() -> None:
    odd = model(pieces(), ffn_dim=40)
    shapes = {"w1": (40, 64), "w2": (64, 40), "w3": (40, 64)}
    narrow = {
        f"layers.{n}.feed_forward.{name}.weight": LazyTensor.make(Given(DType.F32, shape, bytes(40 * 64 * 4)))
        for n in (0, 1)
        for name, shape in shapes.items()
    }
    checkpoint = write(replace(odd, tensors={**odd.tensors, **narrow}), DType.Q8_0)
    types = {name: tensor.spec.dtype for name, tensor in checkpoint.items() if ".1." in name and "norm" not in name}
    assert types.pop("blk.1.ffn_down.weight") is DType.F16
    assert set(types.values()) == {DType.Q8_0}
    assert checkpoint.metadata["general.file_type"] == {"uint32": 7}
    assert ["float16" in warning for warning in checkpoint.warnings] == [True]


def test_other_floats_are_quantised_by_way_of_float32() -> None:
    made, expected = (write(model(pieces(), dtype=dtype), DType.Q8_0) for dtype in (DType.F64, DType.F32))
    assert evaluate(made["blk.0.attn_q.weight"]) == evaluate(expected["blk.0.attn_q.weight"])
