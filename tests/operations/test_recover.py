"""recover and diff against the tuned weights themselves, and against what the original scripts compute."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import TORCH_DTYPES, digests, random_tensor, same_bits, to_bytes, write_checkpoint

import weightops
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.layout import Literal
from weightops.formats.safetensors import safetensors_layout
from weightops.layouts.restored import rotary_frequencies
from weightops.spec import DType, TensorSpec

GOLDEN = Path(__file__).parent.parent / "golden" / "knowlm"
State = dict[str, torch.Tensor]


def weights(folder: Path) -> State:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def model(seed: int, vocab: int = 40, dtype: torch.dtype = torch.float16) -> State:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    return {
        "model.embed_tokens.weight": normal(vocab, 16),
        "model.layers.0.mlp.up_proj.weight": normal(24, 16),
        "model.norm.weight": normal(16),
        "lm_head.weight": normal(vocab, 16),
    }


# --- the golden case: KnowLM's own script under its own pins -------------------------------------------------------


@pytest.mark.parametrize(("diff", "recovered"), [("diff", "recovered"), ("diff-fp16", "recovered-fp16")])
def test_knowlm_files_come_out_with_the_md5_of_the_original_script(tmp_path: Path, diff: str, recovered: str) -> None:
    weightops.recover(
        GOLDEN / "raw",
        GOLDEN / diff,
        tmp_path / "out",
        format="torch-1.12",
        max_shard_size="150KB",
        expect=GOLDEN / f"{recovered}.md5",
    )
    for line in (GOLDEN / f"{recovered}.md5").read_text().splitlines():
        expected, name = line.split()
        assert hashlib.md5((tmp_path / "out" / name).read_bytes()).hexdigest() == expected
    index = (GOLDEN / f"{recovered}.index.json").read_bytes()
    assert (tmp_path / "out" / "pytorch_model.bin.index.json").read_bytes() == index
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["torch_dtype"] == (
        "float16" if "fp16" in diff else "float32"
    )


# --- exact deltas -------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_exact_recovers_every_bit(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    raw: State = {}
    tuned: State = {}
    for i in range(data.draw(st.integers(1, 6))):
        dtype = data.draw(st.sampled_from(TORCH_DTYPES))
        shape = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
        side = data.draw(st.sampled_from(["both", "grown", "shrunk", "reshaped", "retyped", "added", "removed"]))
        other = random_tensor(dtype, shape, i)
        if side != "added":
            raw[f"t{i}"] = other
        if side == "removed":
            continue
        if side in ("grown", "shrunk"):
            shape = (shape[0] + 2 if side == "grown" else shape[0] // 2, *shape[1:])
        elif side == "reshaped":
            shape = (*shape, 3)
        elif side == "retyped":
            dtype = data.draw(st.sampled_from(TORCH_DTYPES))
        tuned[f"t{i}"] = random_tensor(dtype, shape, 1000 + i)
    if not raw or not tuned:
        return
    write_checkpoint(tmp_path / "raw", raw)
    write_checkpoint(tmp_path / "tuned", tuned)
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta", max_shard_size=100)
    weightops.recover(tmp_path / "raw", tmp_path / "delta", tmp_path / "out", max_shard_size=150)
    assert same_bits(weights(tmp_path / "out"), tuned)
    tuned_id = weightops.manifest(tmp_path / "tuned").content_id
    assert weightops.manifest(tmp_path / "out").content_id == tuned_id


def test_exact_recovers_types_that_torch_cannot_compute_with(tmp_path: Path) -> None:
    dtypes = [d for d in DType if d.in_safetensors]
    layout = safetensors_layout([(d.name, TensorSpec(d, (8, 5))) for d in dtypes], {"format": "pt"})
    random = np.random.default_rng(0)
    for side in ("raw", "tuned"):
        (tmp_path / side).mkdir()
        parts = [p.data if isinstance(p, Literal) else random.bytes(p.nbytes) for p in layout.pieces]
        (tmp_path / side / "model.safetensors").write_bytes(b"".join(parts))
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta")
    weightops.recover(tmp_path / "raw", tmp_path / "delta", tmp_path / "out")
    recovered, tuned = (tmp_path / side / "model.safetensors" for side in ("out", "tuned"))
    assert recovered.read_bytes() == tuned.read_bytes()


def test_exact_recovers_types_that_only_torch_files_hold(tmp_path: Path) -> None:
    for seed, side in enumerate(("raw", "tuned")):
        torch.manual_seed(seed)
        (tmp_path / side).mkdir()
        tensors = {"z": torch.randn(6, 4, dtype=torch.complex128), "h": torch.randn(5)}
        torch.save(tensors, tmp_path / side / "pytorch_model.bin")
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta")
    weightops.recover(tmp_path / "raw", tmp_path / "delta", tmp_path / "out", format="torch")
    recovered, tuned = (tmp_path / side / "pytorch_model.bin" for side in ("out", "tuned"))
    assert recovered.read_bytes() == tuned.read_bytes()


def test_exact_keeps_raw_weights_out_of_a_grown_embedding(tmp_path: Path) -> None:
    raw, tuned = model(0), model(1, vocab=42)
    tuned["model.embed_tokens.weight"][:40] = raw["model.embed_tokens.weight"]
    write_checkpoint(tmp_path / "raw", raw)
    write_checkpoint(tmp_path / "tuned", tuned)
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta")
    stored = weights(tmp_path / "delta")["model.embed_tokens.weight"]
    assert not stored[:40].view(torch.int16).any()
    assert to_bytes(stored[40:]) == to_bytes(tuned["model.embed_tokens.weight"][40:])


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """raw, tuned, and their exact delta."""
    write_checkpoint(tmp_path / "raw", model(0), {"vocab_size": 40})
    write_checkpoint(tmp_path / "tuned", model(1), {"vocab_size": 40, "note": "tuned"})
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta")
    return tmp_path


def test_a_base_with_one_flipped_bit_is_refused_by_name_and_nothing_is_written(pair: Path) -> None:
    changed = model(0)
    changed["model.norm.weight"].view(torch.int16)[3] ^= 1
    write_checkpoint(pair / "raw", changed)
    before = digests(pair)
    with pytest.raises(IncompatibleInputs, match=r"not the base of this delta: model\.norm\.weight differs"):
        weightops.recover(pair / "raw", pair / "delta", pair / "out")
    assert digests(pair) == before
    assert not (pair / "out.partial").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("model.norm.weight"), "raw lacks model.norm.weight"),
        (lambda s: s.update(extra=torch.zeros(2)), "the delta's base has not, extra"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(17).half()}), r"model.norm.weight is float16 \[17\]"),
    ],
)
def test_another_base_is_refused_from_headers(pair: Path, change: object, words: str) -> None:
    changed = model(0)
    change(changed)
    write_checkpoint(pair / "raw", changed)
    with pytest.raises(IncompatibleInputs, match=words):
        weightops.recover(pair / "raw", pair / "delta", pair / "out")


def test_a_damaged_delta_is_refused_by_tensor(pair: Path) -> None:
    path = pair / "delta" / "delta.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (path.parent / "weightops-manifest.json").unlink()
    with pytest.raises(CorruptInput, match=r"the delta is damaged: it does not give .* as it was"):
        weightops.recover(pair / "raw", pair / "delta", pair / "out")
    assert not (pair / "out").exists()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"schema":"weightops-delta/9"}',
        lambda d: {**d, "surprise": 1},
        lambda d: {**d, "carried": ["model.norm.weight"]},
        lambda d: {**d, "tuned": {**d["tuned"], "tensors": d["tuned"]["tensors"][1:]}},
        lambda d: {**d, "tuned": {**d["tuned"], "tensors": [{**t, "shape": [1]} for t in d["tuned"]["tensors"]]}},
    ],
)
def test_a_lying_delta_document_is_refused(pair: Path, document: object) -> None:
    path = pair / "delta" / "weightops-delta.json"
    if callable(document):
        document = json.dumps(document(json.loads(path.read_bytes()))).encode()
    assert isinstance(document, bytes)
    path.write_bytes(document)
    with pytest.raises(
        CorruptInput,
        match=r"not a delta that|not JSON|a JSON object|name different tensors|which cannot give",
    ):
        weightops.recover(pair / "raw", pair / "delta", pair / "out")


def test_config_comes_from_the_delta_and_the_tokenizer_from_raw_if_it_has_none(pair: Path) -> None:
    (pair / "raw" / "tokenizer.model").write_bytes(b"raw tokenizer")
    weightops.recover(pair / "raw", pair / "delta", pair / "out")
    assert json.loads((pair / "out" / "config.json").read_bytes())["note"] == "tuned"
    assert (pair / "out" / "tokenizer.model").read_bytes() == b"raw tokenizer"
    assert not (pair / "out" / "weightops-delta.json").exists()


def test_a_delta_is_no_model(pair: Path) -> None:
    with pytest.raises(IncompatibleInputs, match="is a delta, not a model"):
        weightops.diff(pair / "delta", pair / "tuned", pair / "out")
    with pytest.raises(IncompatibleInputs, match="is a delta, not a model"):
        weightops.recover(pair / "delta", pair / "delta", pair / "out")


def test_exact_result_can_be_cast(pair: Path) -> None:
    weightops.recover(pair / "raw", pair / "delta", pair / "out", dtype="float32")
    assert same_bits(weights(pair / "out"), {n: t.float() for n, t in model(1).items()})


# --- published diffs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_subtract_and_recover_are_the_arithmetic_of_the_original_scripts(tmp_path: Path, dtype: str) -> None:
    raw, tuned = model(0), model(1)
    write_checkpoint(tmp_path / "raw", raw, {"torch_dtype": "float16"})
    write_checkpoint(tmp_path / "tuned", tuned, {"torch_dtype": "float16"}, shards=2)
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", method="subtract", dtype=dtype)
    kind = getattr(torch, dtype)
    expected = {n: t.to(kind).add_(-raw[n].to(kind)) for n, t in tuned.items()}
    assert same_bits(weights(tmp_path / "diff"), expected)
    assert json.loads((tmp_path / "diff" / "config.json").read_bytes())["torch_dtype"] == dtype
    weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert same_bits(weights(tmp_path / "out"), {n: t.add_(raw[n].to(kind)) for n, t in expected.items()})


def test_dtype_converts_both_before_adding_as_knowlm_is_fp16_does(tmp_path: Path) -> None:
    raw, diff = model(0), model(2, dtype=torch.float32)
    write_checkpoint(tmp_path / "raw", raw)
    write_checkpoint(tmp_path / "diff", diff, {"torch_dtype": "float32"})
    weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out", dtype="float16")
    assert same_bits(weights(tmp_path / "out"), {n: t.half().add_(raw[n]) for n, t in diff.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["torch_dtype"] == "float16"


def grown(policy: str) -> State:
    """What a grown vocabulary recovers to, as the scripts of the time compute it on whole tensors."""
    raw, diff = model(0), model(2, vocab=43)
    result = {}
    for name, change in diff.items():
        base = raw[name]
        if base.shape == change.shape:
            result[name] = change + base
            continue
        old = base.shape[0]
        if policy == "mean":
            new = base.mean(dim=0, keepdim=True).expand(change.shape[0] - old, -1)
        elif policy == "zero":
            new = torch.zeros(change.shape[0] - old, base.shape[1], dtype=base.dtype)
        else:
            block = change.clone()
            block[:old, : base.shape[1]] += base
            result[name] = block
            continue
        result[name] = change + torch.cat([base, new])
    return result


@pytest.mark.parametrize("policy", ["mean", "zero", "stored"])
def test_vocabulary_growth_follows_the_named_policy(tmp_path: Path, policy: str) -> None:
    diff = model(2, vocab=43)
    diff["lm_head.weight"][41, 3] = -0.0
    write_checkpoint(tmp_path / "raw", model(0))
    write_checkpoint(tmp_path / "diff", diff)
    weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out", vocab=policy)
    expected = grown(policy)
    found = weights(tmp_path / "out")
    if policy != "mean":
        expected["lm_head.weight"][41, 3] = -0.0 if policy == "stored" else 0.0
        assert same_bits(found, expected)
    else:
        mean = model(0)["lm_head.weight"].mean(dim=0)[3]
        expected["lm_head.weight"][41, 3] = mean
        assert same_bits(found, expected)


def test_llava_block_in_both_dimensions(tmp_path: Path) -> None:
    raw, diff = model(0), model(2)
    diff["lm_head.weight"] = torch.randn(44, 20).half()
    write_checkpoint(tmp_path / "raw", raw)
    write_checkpoint(tmp_path / "diff", {**diff, "model.mm_projector.weight": torch.ones(3)})
    out = tmp_path / "out"
    weightops.recover(tmp_path / "raw", tmp_path / "diff", out, vocab="stored", carry=["*.mm_projector.*"])
    expected = diff["lm_head.weight"].clone()
    expected[:40, :16] += raw["lm_head.weight"]
    assert to_bytes(weights(out)["lm_head.weight"]) == to_bytes(expected)
    assert weights(out)["model.mm_projector.weight"].tolist() == [1.0, 1.0, 1.0]


def test_vocabulary_growth_without_a_policy_names_sizes_and_choices(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "raw", model(0))
    write_checkpoint(tmp_path / "diff", model(2, vocab=43))
    with pytest.raises(IncompatibleInputs, match="raw has 40 rows, the diff has 43") as caught:
        weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert all(policy in str(caught.value.hint) for policy in ("mean", "zero", "stored"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw, diff: raw.pop("model.norm.weight"), "raw lacks model.norm.weight"),
        (lambda raw, diff: diff.pop("model.norm.weight"), "the diff lacks model.norm.weight"),
        (lambda raw, diff: raw.update({"model.norm.weight": torch.zeros(9)}), r"model.norm.weight: raw is \[9\]"),
        (lambda raw, diff: raw.update({"lm_head.weight": torch.zeros(41, 16)}), r"lm_head.weight: raw is \[41, 16\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: object, words: str) -> None:
    raw, diff = model(0), model(2)
    change(raw, diff)
    write_checkpoint(tmp_path / "raw", raw)
    write_checkpoint(tmp_path / "diff", diff)
    with pytest.raises(IncompatibleInputs, match=words):
        weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out", vocab="mean")
    assert not (tmp_path / "out.partial").exists()


def test_drop_leaves_out_what_only_raw_has(tmp_path: Path) -> None:
    diff = model(2)
    del diff["lm_head.weight"]
    write_checkpoint(tmp_path / "raw", model(0))
    write_checkpoint(tmp_path / "diff", diff)
    weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out", drop=["lm_head.*"])
    assert weights(tmp_path / "out").keys() == diff.keys()


def test_rotary_frequencies_that_raw_lacks_are_computed_as_2023_did(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    config = {"hidden_size": 512, "num_attention_heads": 4}
    write_checkpoint(tmp_path / "raw", model(0), config)
    write_checkpoint(tmp_path / "diff", {**model(2), name: torch.zeros(64)})
    weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    expected = 1.0 / (10000 ** (torch.arange(0, 128, 2).float() / 128))
    assert to_bytes(weights(tmp_path / "out")[name]) == to_bytes(expected)
    write_checkpoint(tmp_path / "raw", {**model(0), name: expected})
    write_checkpoint(tmp_path / "diff", model(2))
    weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "without")
    assert name not in weights(tmp_path / "without")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": 512},
        {"num_attention_heads": 4},
        {"hidden_size": "512", "num_attention_heads": 4},
        {"head_dim": "128"},
        {"head_dim": -128},
        {"head_dim": (1 << 16) + 2},
        {"head_dim": 128, "rope_theta": "10000"},
        {"head_dim": 128, "rope_parameters": {"rope_theta": [1]}},
    ],
)
def test_rotary_frequencies_are_not_guessed(config: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleInputs, match=r"inv_freq: has no rotary_emb\.inv_freq, and its config\.json has no"):
        rotary_frequencies(config, "inv_freq")


def test_a_tied_head_that_raw_leaves_out_is_its_embedding(tmp_path: Path) -> None:
    raw, diff = model(0), model(2)
    del raw["lm_head.weight"]
    write_checkpoint(tmp_path / "raw", raw, {"tie_word_embeddings": True})
    write_checkpoint(tmp_path / "diff", diff)
    weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    expected = diff["lm_head.weight"] + raw["model.embed_tokens.weight"]
    assert to_bytes(weights(tmp_path / "out")["lm_head.weight"]) == to_bytes(expected)


def test_arithmetic_that_torch_lacks_is_refused_before_work(tmp_path: Path) -> None:
    state = {"w": random_tensor(DType.F8_E4M3, (4,), 0)}
    write_checkpoint(tmp_path / "raw", state)
    write_checkpoint(tmp_path / "diff", state)
    with pytest.raises(UsageError, match="float8_e4m3fn has no addition"):
        weightops.recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
