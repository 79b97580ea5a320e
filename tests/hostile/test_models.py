"""Models with hostile parameters, names and tensors, given to `convert`: one error, soon, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from meta_model import make_meta

from weightops import api
from weightops.cli.main import run
from weightops.errors import CorruptInput, WeightopsError
from weightops.io.escape import is_harmless

SMALL: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "vocab": 40}
SMALL |= {"dtype": torch.float16}
CONTEXT = {"context_length": "2048"}
FILES = {"one": "params.json", "two": "params.json", "hf": "config.json", "tencentpretrain": "config.json"}


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """A small model in every layout, Meta's also in two parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        more: dict[str, Any] = {"hidden_dim": 256, "head_dim": 8, "sliding_window": 64}
        more |= {"rope_theta": 1e4, "max_seq_len": 2048, "ffn_dim_multiplier": 1.0, "use_scaled_rope": False}
        make_meta(folder / "one", **SMALL, parts=1)
        make_meta(folder / "two", **SMALL, parts=2, params=more)
        for layout in ("hf", "tencentpretrain"):
            api.convert(folder / "one", folder / layout, to=layout, set=CONTEXT)
        yield folder


def refusal(folder: Path, to: str, **options: Any) -> WeightopsError | None:
    """What `convert` says of a model; if it refuses it, nothing is left beside it."""
    try:
        api.convert(folder, folder.parent / "out", to=to, **{"set": CONTEXT, **options})
    except WeightopsError as error:
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        return error
    return None


FIELDS = {
    "params.json": sorted(
        {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size"}
        | {"rope_theta", "use_scaled_rope", "rope_scaling_factor", "head_dim", "hidden_dim", "sliding_window", "model"}
        | {"max_seq_len", "max_position_embeddings", "model_type", "tied_embeddings", "_sliding_window", "x\x1b[2J"}
    ),
    "config.json": sorted(
        {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"}
        | {"vocab_size", "rms_norm_eps", "max_position_embeddings", "head_dim", "hidden_act", "model_type"}
        | {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings"}
        | {"sliding_window", "quantization_config", "eos_token_id", "bos_token_id", "pad_token_id"}
        | {"emb_size", "feedforward_size", "heads_num", "layers_num", "local_kv_heads_num", "max_seq_length"}
        | {"layernorm_eps", "layernorm", "attention_head_size", "rotary_position_embedding"}
    ),
}
EXTREME = [0, -1, 1, 2, 3, 8, 10**9, 2**31, 2**40 - 1, 2**62, 10**308, 10**400, -(10**400), 10**4000]
FLOATS = [0.5, 1e-320, 1e300, float("inf"), float("-inf"), float("nan"), -0.0]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(EXTREME)
SCALARS |= st.sampled_from(FLOATS) | st.sampled_from(["llama", "llama3", "default", "\x1b[2J", "\u202e", "9" * 5000])
KEYS = st.sampled_from(["rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "dim", "a"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=6
)


@given(data=st.data(), layout=st.sampled_from(sorted(FILES)), to=st.sampled_from(("hf", "meta", "llama_inference")))
@settings(max_examples=300, deadline=10_000)
def test_any_value_of_any_field_is_taken_or_refused(models: Path, data: st.DataObject, layout: str, to: str) -> None:
    name = FILES[layout]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        shutil.copytree(models / layout, folder, copy_function=os.link)
        document = json.loads((folder / name).read_text())
        document |= data.draw(st.dictionaries(st.sampled_from(FIELDS[name]), VALUES, min_size=1, max_size=3))
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(document))
        error = refusal(folder, to, set=CONTEXT if data.draw(st.booleans()) else {})
        event("taken" if error is None else type(error).__name__)
        if error is not None:
            assert is_harmless(f"{error}{error.hint}")
            assert len(str(error)) < 2000


HUGE = {"one": "n_layers", "two": "n_layers", "hf": "num_hidden_layers", "tencentpretrain": "layers_num"}


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("value", [10**9, 2**40 - 1, 2**62])
def test_absurd_numbers_cost_neither_time_nor_memory(models: Path, tmp_path: Path, layout: str, value: int) -> None:
    folder = shutil.copytree(models / layout, tmp_path / "model")
    path = folder / FILES[layout]
    path.write_text(json.dumps(json.loads(path.read_text()) | {HUGE[layout]: value}))
    tracemalloc.start()
    start = time.perf_counter()
    try:
        assert isinstance(refusal(folder, "meta"), CorruptInput)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 5


def number_of_layer(digits: str) -> str:
    return f"encoder.transformer.{digits}.self_attn.linear_layers.0.weight"


NAMES = ("\x1b[2J\u202e", "\x1b[2J/tok_embeddings.weight", "layers.0.\x1b]0;x\x07.weight")
LAYERS = tuple(map(number_of_layer, ("9" * 5000, "999999999", "\u0661")))


@pytest.mark.parametrize("name", [*NAMES, *LAYERS], ids=ascii)
@pytest.mark.parametrize("layout", ["one", "two", "tencentpretrain"])
def test_hostile_names_are_refused_and_shown_harmlessly(
    models: Path, tmp_path: Path, layout: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(models / layout, tmp_path / "model")
    path = max(path for path in folder.iterdir() if path.suffix in (".pth", ".bin"))
    torch.save({**torch.load(path), name: torch.zeros(4, 4)}, path)
    assert run(["convert", str(folder), "--to", "hf", "--out", str(tmp_path / "out")]) in (2, 13)
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert is_harmless(said.replace("\n", ""))
    assert len(said) < 2000
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


TENSORS = {
    "no dimension": torch.tensor(1.0),
    "one": torch.zeros(31),
    "three": torch.zeros(2, 16, 32),
    "empty": torch.zeros(0, 32),
    "empty too": torch.zeros(32, 0),
    "integers": torch.zeros(32, 32, dtype=torch.int64),
    "booleans": torch.zeros(32, 32, dtype=torch.bool),
}
WHERE = ("tok_embeddings", "output", "norm", "layers.0.attention.wq", "layers.0.attention.wk", "layers.0.ffn_norm")


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", [*WHERE, "layers.0.feed_forward.w1", "layers.0.feed_forward.w2", "rope.freqs"])
@pytest.mark.parametrize("layout", ["one", "two"])
def test_tensors_of_other_shapes_and_types_are_refused(
    models: Path, tmp_path: Path, layout: str, name: str, tensor: str
) -> None:
    """Rotary frequencies are left out whatever they are; as much of them as there should be must be right."""
    folder = shutil.copytree(models / layout, tmp_path / "model")
    key = name if name == "rope.freqs" else f"{name}.weight"
    path = max(folder.glob("*.pth"))
    torch.save({**torch.load(path), key: TENSORS[tensor]}, path)
    error = str(refusal(folder, "hf"))
    assert key in error or "feed-forward" in error or "vocab_size" in error or (key, error) == ("rope.freqs", "None")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"dim":NaN}', b'{"dim":1,"dim":2}', b"\xff", b"[" * 10**6])
@pytest.mark.parametrize("layout", FILES)
def test_documents_that_are_no_json_objects(models: Path, tmp_path: Path, layout: str, content: bytes) -> None:
    folder = shutil.copytree(models / layout, tmp_path / "model")
    (folder / FILES[layout]).write_bytes(content)
    with pytest.raises(CorruptInput, match=FILES[layout]):
        api.convert(folder, tmp_path / "out", to="meta", set=CONTEXT)


def test_meta_may_not_be_claimed_of_anything(models: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "consolidated.00.pth")
    for folder in (tmp_path, models / "hf"):
        with pytest.raises(WeightopsError, match=r"holds no (tensors|weights)"):
            api.convert(folder, tmp_path / "out", to="hf", from_="meta")
