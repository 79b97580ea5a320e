"""Meta's layout and Mistral's: what is derived and what is asked for, parts that repeat heads, params.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meta_model import make_meta, meta_forward, split_axis, whole_tensors
from safetensors.torch import load_file, save_file
from small_tokenizers import rank_tokens, render_ranks
from support import given_tensor, same_bits
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.layouts import meta, releases
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.names import roles, shape_of
from weightops.layouts.releases import RELEASES, Release
from weightops.layouts.source import Source
from weightops.layouts.tokenizers import ranks
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType, TensorSpec

SMALL: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "vocab": 40}
SMALL |= {"parts": 1, "dtype": torch.float32, "rope_freqs": False}
CONTEXT = {"context_length": "2048"}


def make(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    return make_meta(folder, **{**SMALL, **changes})


def convert(source: Path, out: Path, to: str, **options: Any) -> api.Result:
    return api.convert(source, out, to=to, **{"set": CONTEXT, **options})


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's only file."""
    (path,) = (path for path in folder.iterdir() if path.suffix in (".pth", ".bin", ".safetensors"))
    tensors: dict[str, torch.Tensor] = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    return tensors


def headers(h: Hyperparameters, params: Mapping[str, Any], parts: int = 1, **settings: Any) -> Source:
    """A model of any size, of which there are only headers; all its values are zero."""
    tensors: dict[str, LazyTensor] = {}
    for part in range(parts):
        for role, n in roles(h.n_layers):
            name, shape = role.name("meta", n), list(shape_of(role, h))
            axis = split_axis(name, 0)
            if axis is not None:
                shape[axis] //= min(parts, h.n_kv_heads) if ".wk." in name or ".wv." in name else parts
            spec = TensorSpec(DType.BF16, tuple(shape))
            tensors[f"consolidated.{part:02d}/{name}" if parts > 1 else name] = LazyTensor(ZERO, (), spec)
    content = json.dumps(params).encode()
    files = {"params.json": content}
    return Source(Checkpoint("model", tensors), files.get, lambda tensor: bytes(tensor.nbytes), settings)


ZERO = Given(DType.U8, (0,), b"")


def published(release: Release) -> tuple[Hyperparameters, dict[str, Any]]:
    """A release's parameters, as far as `releases` knows them, and its params.json."""
    h = Hyperparameters(
        family="mistral" if release.family == "mistral" else "llama",
        dim=release.dim,
        n_layers=release.n_layers,
        n_heads=32 if release.name.startswith("Mistral") else release.dim // release.head_dim,
        n_kv_heads=release.n_kv_heads,
        head_dim=release.head_dim,
        ffn_dim=1024,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=release.rope_theta,
    )
    params = meta.params_of(h) | ({"use_scaled_rope": True} if release.rope_factor else {})
    return h, params


ASKED = ("LLaMA 7B", "LLaMA 13B", "Llama 2 7B", "Llama 2 13B", "Mistral Nemo", "Mistral Nemo as first published")


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_what_a_release_leaves_unsaid_is_known_or_asked_for(release: Release) -> None:
    h, params = published(release)
    model = meta.read(headers(h, params))
    found = model.hyperparameters
    if release.name in ASKED:
        assert found.context_length is None
        with pytest.raises(UsageError, match="for how long a context"):
            found.known_context_length()
        found = meta.read(headers(h, params, context_length=release.context_length)).hyperparameters
    assert found.context_length == release.context_length
    assert found.tied == release.tied
    assert (found.rope_scaling.factor if found.rope_scaling else None) == release.rope_factor
    assert release.name in ASKED or any(release.name in note for note in model.notes)


@pytest.mark.parametrize("change", [{"n_layers": 3}, {"rope_theta": 2e6}, {"head_dim": 64, "n_heads": 64}])
def test_nothing_is_derived_for_numbers_that_no_release_has(change: dict[str, Any]) -> None:
    h, _ = published(next(r for r in RELEASES if r.name == "Llama 3.1 8B"))
    h = replace(h, **change)
    model = meta.read(headers(h, meta.params_of(h)))
    assert (model.hyperparameters.context_length, model.hyperparameters.tied, model.notes) == (None, False, ())
    with pytest.raises(UsageError, match="by how much is not said") as raised:
        meta.read(headers(h, meta.params_of(h) | {"use_scaled_rope": True}))
    assert "rope_factor" in str(raised.value.hint)


def test_405b_in_16_parts_says_16_heads_for_8() -> None:
    """At full size: opening 18,192 tensors is quick, and the heads are those of the other files."""
    h, params = published(next(r for r in RELEASES if "405B" in r.name))
    found = meta.read(headers(h, params | {"n_kv_heads": 16}, parts=16))
    assert found.hyperparameters.n_kv_heads == 8
    assert "8 heads of k and v, each in two parts" in found.notes[0]
    assert found.tensors["layers.125.attention.wk.weight"].spec.shape == (1024, 16384)


def test_heads_that_files_for_more_parts_count_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta, "_REPEATED", (32, 2, 4, 4))
    whole = make(tmp_path / "meta", parts=4, params={"n_kv_heads": 4})
    convert(tmp_path / "meta", tmp_path / "one", "meta", model_parallel=1)
    assert same_bits(load(tmp_path / "one"), whole)
    assert json.loads((tmp_path / "one/params.json").read_text())["n_kv_heads"] == 2
    convert(tmp_path / "meta", tmp_path / "four", "meta")
    assert (tmp_path / "four/params.json").read_bytes() == (tmp_path / "meta/params.json").read_bytes()
    part = torch.load(tmp_path / "meta/consolidated.03.pth")
    part["layers.1.attention.wv.weight"][0] += 1
    torch.save(part, tmp_path / "meta/consolidated.03.pth")
    with pytest.raises(CorruptInput, match=r"layers\.1\.attention\.wv\.weight: the parts that repeat a head"):
        convert(tmp_path / "meta", tmp_path / "bad", "hf")


@given(dim=st.integers(1, 20000), ffn=st.integers(2, 80000))
def test_the_rule_of_the_inner_dimension_is_solved(dim: int, ffn: int) -> None:
    multiple_of, multiplier = meta._solve_ffn(dim, ffn)
    assert meta.ffn_dim(dim, multiple_of, 1.0 if multiplier is None else multiplier) == ffn


@pytest.mark.parametrize(
    ("dim", "ffn", "expected"),
    [
        (4096, 11008, (256, None)),  # LLaMA 7B
        (8192, 28672, (4096, 1.3)),  # Llama 2 70B
        (4096, 14336, (1024, 1.3)),  # Llama 3 8B
        (16384, 53248, (4096, 1.2)),  # Llama 3.1 405B
    ],
)
def test_published_numbers_come_back(dim: int, ffn: int, expected: tuple[int, float | None]) -> None:
    assert meta._solve_ffn(dim, ffn) == expected


STATED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "theta as text": ({"rope_theta": "500000"}, {}, "rope_theta is '500000', expected a number"),
    "theta below zero": ({"rope_theta": -1}, {}, "rope_theta is -1"),
    "context as a flag": ({"max_position_embeddings": True}, {}, "max_position_embeddings is True"),
    "vocabulary as text": ({"vocab_size": "40"}, {}, "vocab_size is '40', the 1 parts hold 40"),
    "another theta": ({"rope_theta": 5e5}, {"rope_theta": 1e4}, "rope_theta=500000.0, not 10000.0"),
    "other heads": ({}, {"n_heads": 2}, "n_heads is 4, not 2"),
    "another epsilon": ({}, {"norm_eps": 1e-6}, "norm_eps is 1e-05, not 1e-06"),
    "a factor for no scaling": ({}, {"rope_factor": 8}, "rope_factor is None, not 8"),
    "another factor": ({"use_scaled_rope": True, "rope_scaling_factor": 8}, {"rope_factor": 32}, "=8.0, not 32.0"),
    "odd heads": ({"head_dim": 7}, {}, "each of 7 rows, make no LLaMA model"),
    "heads of k that do not divide": ({"n_kv_heads": 3}, {}, "4 heads of q and 3 of k"),
    "windows by layer": ({"_sliding_window": [None, 8]}, {}, r"_sliding_window is \[None, 8\]"),
}


@pytest.mark.parametrize("case", STATED)
def test_what_makes_no_sense_or_contradicts_the_user_is_refused(tmp_path: Path, case: str) -> None:
    params, settings, words = STATED[case]
    make(tmp_path / "meta", params=params)
    with pytest.raises((CorruptInput, UsageError), match=words):
        convert(tmp_path / "meta", tmp_path / "out", "hf", set=CONTEXT | {k: str(v) for k, v in settings.items()})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [0, -1])
def test_there_is_at_least_one_part(tmp_path: Path, parts: int) -> None:
    make(tmp_path / "meta")
    with pytest.raises(UsageError, match=f"among {parts} parts"):
        convert(tmp_path / "meta", tmp_path / "out", "meta", model_parallel=parts)


def drop(folder: Path, name: str) -> None:
    path = folder / "consolidated.00.pth"
    torch.save({key: tensor for key, tensor in torch.load(path).items() if key != name}, path)


def test_a_missing_head_is_not_taken_for_a_tied_one(tmp_path: Path) -> None:
    make(tmp_path / "meta")
    drop(tmp_path / "meta", "output.weight")
    with pytest.raises(CorruptInput, match=r"output\.weight is missing"):
        convert(tmp_path / "meta", tmp_path / "hf", "hf")


def to_meta(tensors: Mapping[str, torch.Tensor], n_heads: int, n_kv_heads: int) -> dict[str, torch.Tensor]:
    """transformers' tensors by Meta's names, rows of q and k back in adjacent pairs; the other direction's inverse."""
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    result = {}
    for name, tensor in tensors.items():
        heads = n_heads if "q_proj" in name else n_kv_heads if "k_proj" in name else 0
        if heads:
            half = len(tensor) // heads // 2
            order = [h * half * 2 + i + j * half for h in range(heads) for i in range(half) for j in (0, 1)]
            tensor = tensor[order]
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = tensor.contiguous()
    return result


PARAMS = {"dim": 48, "n_layers": 2, "head_dim": 16, "hidden_dim": 80, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
PARAMS |= {"vocab_size": 50, "rope_theta": 1e6, "sliding_window": 8}


def mistral(folder: Path) -> MistralForCausalLM:
    """A random Mistral model whose heads do not make up its dimensions, in Mistral's files beside transformers' own."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=48,
        num_hidden_layers=2,
        head_dim=16,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=50,
        sliding_window=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="eager",
    )
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(folder)
    save_file(to_meta(model.state_dict(), 4, 2), folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return model


@torch.no_grad()
def test_mistrals_own_file_beside_that_of_transformers(tmp_path: Path) -> None:
    model = mistral(tmp_path / "mistral")
    ids = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(1))
    convert(tmp_path / "mistral", tmp_path / "hf", "hf", from_="meta", set={"context_length": "64"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    assert isinstance(again, MistralForCausalLM)
    assert (again.config.sliding_window, again.config.head_dim, again.config.max_position_embeddings) == (8, 16, 64)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    # and back, from the file of transformers that lies beside
    convert(tmp_path / "mistral", tmp_path / "back", "meta", from_="hf", set={}, model_parallel=1)
    assert same_bits(load(tmp_path / "back"), load_file(tmp_path / "mistral/consolidated.safetensors"))
    assert json.loads((tmp_path / "back/params.json").read_text()) == PARAMS


@pytest.mark.parametrize(
    ("params", "theta", "window"),
    [
        ({"sliding_window": 4096}, 1e4, 4096),
        ({"_sliding_window": 4096}, 1e4, 4096),
        ({}, 1e6, None),
        ({"rope_theta": 5e5}, 5e5, None),
    ],
)
def test_mistrals_rule_for_an_absent_rope_theta(params: dict[str, Any], theta: float, window: int | None) -> None:
    h = Hyperparameters(family="mistral", rope_theta=theta, sliding_window=window, **SIZES)
    source = headers(h, {k: v for k, v in PARAMS.items() if k not in ("rope_theta", "sliding_window")} | params)
    found = meta.read(source)
    assert found.hyperparameters == h
    assert any("rope_theta" in note for note in found.notes) == ("rope_theta" not in params)


SIZES: dict[str, Any] = {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 80}
SIZES |= {"vocab_size": 50, "norm_eps": 1e-5}


def test_a_tied_model_gets_a_head_of_its_own_and_loses_it_again(tmp_path: Path, monkeypatch: Any) -> None:
    whole = make(tmp_path / "untied", theta=5e5)
    whole["output.weight"] = whole["tok_embeddings.weight"]
    torch.save(whole, tmp_path / "untied/consolidated.00.pth")
    known = Release("Tiny", 32, 2, 2, 5e5, 2048, None, True, head_dim=8)
    monkeypatch.setattr(releases, "RELEASES", (known,))
    convert(tmp_path / "untied", tmp_path / "hf", "hf", set={})
    assert "lm_head.weight" not in load(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert same_bits(load(tmp_path / "meta"), whole)
    convert(tmp_path / "meta", tmp_path / "again", "hf", set={})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    whole["output.weight"] = whole["output.weight"] + 1
    torch.save(whole, tmp_path / "meta/consolidated.00.pth")
    (tmp_path / "meta/weightops-manifest.json").unlink()
    with pytest.raises(CorruptInput, match="the head of this release is its embedding: the values differ"):
        convert(tmp_path / "meta", tmp_path / "bad", "hf", set={})


def model_of(h: Hyperparameters, **changed: Any) -> Model:
    tensors = whole_tensors(
        dim=h.dim,
        n_layers=h.n_layers,
        n_heads=h.n_heads,
        n_kv_heads=h.n_kv_heads,
        ffn_dim=h.ffn_dim,
        vocab=h.vocab_size,
        dtype=torch.float32,
        rope_freqs=False,
    )
    return Model(name="m", hyperparameters=h, tensors={n: given_tensor(t) for n, t in tensors}, **changed)


H = Hyperparameters(**{**SIZES, "head_dim": 12, "vocab_size": 4096})


def test_a_rank_files_embedding_is_divided_by_rows() -> None:
    data = render_ranks(rank_tokens())
    tokenizer = ranks.parse(data, generation="3", instruct=False)
    written = meta.write(model_of(H, tokenizer=tokenizer), 2)
    assert written["consolidated.00/tok_embeddings.weight"].spec.shape == (2048, 48)
    assert written.sidecar("tokenizer.model") == data
    columns = meta.write(model_of(H), 2)
    assert columns["consolidated.00/tok_embeddings.weight"].spec.shape == (4096, 24)


WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "heads of another size": ({"head_dim": 16}, "heads of 16 do not make 48 dimensions"),
    "scaling with other limits": ({"rope_scaling": RopeScaling(factor=8, low_freq_factor=2)}, "other limits than"),
    "scaling in Mistral's": ({"rope_scaling": RopeScaling(factor=8), "family": "mistral"}, "no place in Mistral's"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_params_json_cannot_say_is_refused(case: str) -> None:
    changes, words = WRITTEN[case]
    with pytest.raises(UsageError, match=words):
        meta.params_of(replace(H, **changes))


@pytest.mark.parametrize("embed_axis", [0, 1])
@torch.no_grad()
def test_the_last_part_may_have_more_rows(tmp_path: Path, embed_axis: int) -> None:
    """49,953 tokens in two parts of 24,976 and 24,977 rows, as TencentPretrain's users have them."""
    whole = make(tmp_path / "meta", parts=2, vocab=41, embed_axis=embed_axis)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    ids = torch.tensor([[40, 3, 40]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = meta_forward(whole, json.loads((tmp_path / "meta/params.json").read_text()), ids)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)


def resave(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "consolidated.01.pth"
        tensors = torch.load(path)
        change(tensors)
        torch.save(tensors, path)

    return spoil


@pytest.mark.parametrize("shape", [(), (8,), (0, 32), (2, 4, 32)])
@pytest.mark.parametrize("name", ["output", "tok_embeddings", "layers.0.attention.wk", "layers.0.feed_forward.w1"])
def test_a_part_that_is_no_matrix_is_refused_by_name(tmp_path: Path, shape: tuple[int, ...], name: str) -> None:
    """Two parts with one head of k, which both have: their rows are held against each other while headers are read."""
    make(tmp_path / "meta", parts=2, n_kv_heads=1, embed_axis=0)
    resave(lambda tensors: tensors.update({f"{name}.weight": torch.zeros(shape)}))(tmp_path / "meta")
    with pytest.raises(CorruptInput, match=name if "w1" not in name and "out" not in name else "params.json|output"):
        convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
