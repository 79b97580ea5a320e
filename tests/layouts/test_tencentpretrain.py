"""TencentPretrain's layout and llama_inference's: names, config.json, blocks with an index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_model import make_meta
from support import same_bits

from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.layouts import tencentpretrain
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.names import roles, shape_of
from weightops.layouts.source import Source
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType, TensorSpec

SMALL: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "vocab": 41}
SMALL |= {"parts": 1, "dtype": torch.float16, "rope_freqs": False}
VARIANTS = ("tencentpretrain", "llama_inference")

LAYER = {
    "encoder.transformer.0.self_attn.linear_layers.0.weight": "layers.0.attention.wq.weight",
    "encoder.transformer.0.self_attn.linear_layers.1.weight": "layers.0.attention.wk.weight",
    "encoder.transformer.0.self_attn.linear_layers.2.weight": "layers.0.attention.wv.weight",
    "encoder.transformer.0.self_attn.final_linear.weight": "layers.0.attention.wo.weight",
    "encoder.transformer.0.feed_forward.linear_gate.weight": "layers.0.feed_forward.w1.weight",
    "encoder.transformer.0.feed_forward.linear_1.weight": "layers.0.feed_forward.w3.weight",
    "encoder.transformer.0.feed_forward.linear_2.weight": "layers.0.feed_forward.w2.weight",
    "encoder.transformer.0.layer_norm_1.weight": "layers.0.attention_norm.weight",
    "encoder.transformer.0.layer_norm_2.weight": "layers.0.ffn_norm.weight",
    "encoder.layer_norm.weight": "norm.weight",
}
NAMES = {
    "tencentpretrain": {
        "embedding.word.embedding.weight": "tok_embeddings.weight",
        **LAYER,
        "target.lm.output_layer.weight": "output.weight",
    },
    "llama_inference": {
        "embedding.embedding.weight": "tok_embeddings.weight",
        **LAYER,
        "target.lm.weight": "output.weight",
    },
}


def make(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    return make_meta(folder, **{**SMALL, **changes})


def load(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.iterdir()):
        found |= torch.load(path) if path.suffix in (".bin", ".pth") else {}
    return found


def convert(source: Path, out: Path, to: str, settings: dict[str, str] | None = None, **options: Any) -> api.Result:
    return api.convert(source, out, to=to, set=settings, **options)


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; `...` takes a key away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.fixture
def tencent(tmp_path: Path) -> Path:
    make(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "tp", "tencentpretrain")
    return tmp_path / "tp"


@pytest.mark.parametrize("layout", VARIANTS)
def test_the_names_are_theirs_and_the_rows_metas(tmp_path: Path, layout: str) -> None:
    """For heads of k of their own number and an extended, odd vocabulary."""
    whole = make(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "out", layout)
    found = load(tmp_path / "out")
    assert list(found) == list(NAMES[layout])
    assert same_bits(found, {name: whole[meta] for name, meta in NAMES[layout].items()})


def test_config_is_written_as_theirs_and_read_back(tmp_path: Path) -> None:
    make(tmp_path / "meta", theta=5e5)
    convert(tmp_path / "meta", tmp_path / "tp", "tencentpretrain", {"context_length": "77"})
    config = json.loads((tmp_path / "tp/config.json").read_text())
    # models/llama/7b_config.json of TencentPretrain, with the numbers of this model
    assert config == {
        "emb_size": 32,
        "feedforward_size": 256,
        "hidden_size": 32,
        "hidden_act": "silu",
        "heads_num": 4,
        "local_kv_heads_num": 2,
        "layers_num": 1,
        "dropout": 0.0,
        "data_processor": "lm",
        "max_seq_length": 77,
        "embedding": ["word"],
        "remove_transformer_bias": True,
        "remove_embedding_layernorm": True,
        "rotary_position_embedding": True,
        "encoder": "transformer",
        "feed_forward": "gated",
        "mask": "causal",
        "layernorm_positioning": "pre",
        "layernorm": "rms",
        "layernorm_eps": 1e-5,
        "rope_theta": 5e5,
        "target": ["lm"],
    }
    convert(tmp_path / "tp", tmp_path / "hf", "hf")
    found = json.loads((tmp_path / "hf/config.json").read_text())
    assert (found["max_position_embeddings"], found["rope_theta"], found["rms_norm_eps"]) == (77, 5e5, 1e-5)
    assert (found["num_attention_heads"], found["num_key_value_heads"]) == (4, 2)


def test_heads_of_a_size_of_their_own_are_said() -> None:
    h = Hyperparameters(
        dim=48, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=8, vocab_size=9, norm_eps=1e-5
    )
    assert tencentpretrain.config_of(h)["attention_head_size"] == 16


def test_blocks_and_their_index(tmp_path: Path) -> None:
    whole = make(tmp_path / "meta", n_layers=3)
    convert(tmp_path / "meta", tmp_path / "tp", "tencentpretrain", max_shard_size="60KB")
    blocks = sorted(path.name for path in (tmp_path / "tp").glob("*.bin"))
    assert len(blocks) > 2
    assert blocks == [f"tencentpretrain_model-{i}.bin" for i in range(len(blocks))]
    index = json.loads((tmp_path / "tp/tencentpretrain_model.bin.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in whole.values())
    for block in blocks:
        inside = torch.load(tmp_path / "tp" / block)
        assert set(inside) == {name for name, file in index["weight_map"].items() if file == block}
    convert(tmp_path / "tp", tmp_path / "back", "meta", model_parallel=1)
    assert same_bits(load(tmp_path / "back"), whole)


@pytest.mark.parametrize("layout", VARIANTS)
def test_one_file_may_be_named_in_place_of_its_folder(tmp_path: Path, layout: str) -> None:
    whole = make(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "tp", layout)
    (path,) = (tmp_path / "tp").glob("*.bin")
    convert(path, tmp_path / "back", "meta")
    assert same_bits(load(tmp_path / "back"), whole)


def test_what_no_file_says_is_asked_for_by_name(tencent: Path, tmp_path: Path) -> None:
    (tencent / "config.json").unlink()
    settings: dict[str, str] = {}
    for name, value, words in (("n_heads", "4", "how many heads q has"), ("norm_eps", "1e-5", "epsilon of its norms")):
        with pytest.raises(UsageError, match=words) as raised:
            convert(tencent, tmp_path / "back", "meta", settings)
        assert f"--set {name}=" in str(raised.value.hint)
        settings[name] = value
    result = convert(tencent, tmp_path / "back", "meta", settings)
    assert any("rope_theta 10000: TencentPretrain knows no other" in warning for warning in result.warnings)
    assert json.loads((tmp_path / "back/params.json").read_text())["n_kv_heads"] == 2
    assert same_bits(load(tmp_path / "back"), load(tmp_path / "meta"))


@pytest.mark.parametrize(("dim", "layers", "heads"), [(4096, 32, 32), (8192, 80, 64), (2048, 16, 32), (3072, 28, 24)])
def test_heads_of_published_sizes_are_known(dim: int, layers: int, heads: int) -> None:
    """Among them those of Llama 3.2 1B, which are half as large as all others."""
    sizes: dict[str, Any] = {"dim": dim, "n_layers": layers, "n_heads": heads, "head_dim": dim // heads}
    h = Hyperparameters(**sizes, n_kv_heads=8, ffn_dim=4, vocab_size=9, norm_eps=1e-5)
    empty = Given(DType.U8, (0,), b"")
    tensors = {
        role.name("tencentpretrain", n): LazyTensor(empty, (), TensorSpec(DType.F16, shape_of(role, h)))
        for role, n in roles(layers)
    }
    files: dict[str, bytes] = {}
    source = Source(Checkpoint("model", tensors), files.get, lambda _: b"", {"norm_eps": 1e-5})
    assert tencentpretrain.read(source, "tencentpretrain").hyperparameters == h


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers_num": 2}, "config.json: layers_num is 2, a LLaMA model of these tensors has 1"),
    "width": ({"hidden_size": 64}, "hidden_size is 64"),
    "feed-forward": ({"feedforward_size": "x"}, "feedforward_size is 'x'"),
    "heads of k": ({"local_kv_heads_num": 4}, "does not have the 4 heads of its config"),
    "heads": ({"heads_num": 3}, "3 heads do not fit q"),
    "heads as text": ({"heads_num": "4"}, "heads_num is '4', expected a number"),
    "size of heads": ({"attention_head_size": 16}, "attention_head_size is 16"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', a LLaMA model of these tensors has silu"),
    "no rotation": ({"rotary_position_embedding": False}, "rotary_position_embedding is False"),
    "norms": ({"layernorm": "normal"}, "layernorm is 'normal'"),
    "epsilon as text": ({"layernorm_eps": "1e-5"}, "layernorm_eps is '1e-5', expected a number"),
    "theta a list": ({"rope_theta": [1]}, r"rope_theta is \[1\], expected a number"),
    "half a token": ({"max_seq_length": 1.5}, "max_seq_length is 1.5, expected a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_contradicts_the_tensors_is_refused(tencent: Path, tmp_path: Path, case: str) -> None:
    changes, words = BAD[case]
    edit(tencent, **changes)
    with pytest.raises(CorruptInput, match=words):
        convert(tencent, tmp_path / "out", "hf", {"context_length": "64"})
    assert not (tmp_path / "out").exists()


def test_settings_do_not_override_the_config(tencent: Path, tmp_path: Path) -> None:
    for name, value in (("n_heads", "2"), ("norm_eps", "1e-6"), ("rope_theta", "5e5"), ("rope_factor", "8")):
        with pytest.raises(UsageError, match=rf"{name}=|{name} is"):
            convert(tencent, tmp_path / "out", "meta", {name: value})


def test_a_block_that_is_missing_is_noticed(tencent: Path, tmp_path: Path) -> None:
    (path,) = tencent.glob("*.bin")
    tensors = torch.load(path)
    torch.save({name: tensor for name, tensor in tensors.items() if not name.startswith("target")}, path)
    with pytest.raises(CorruptInput, match=r"target\.lm\.output_layer\.weight is missing"):
        convert(tencent, tmp_path / "out", "meta")


H = Hyperparameters(dim=32, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=8, vocab_size=9, norm_eps=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": RopeScaling(factor=8)}, "rope scaling has no place in TencentPretrain's layout"),
        ({"sliding_window": 9}, "a sliding window has no place"),
        ({"tied": True}, "a tied head has no place"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tencentpretrain.write(Model(name="m", hyperparameters=replace(H, **changes), tensors={}), "tencentpretrain")
