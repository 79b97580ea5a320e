"""Convert: every layout into every other and back, to the bit; and what is refused before anything is written."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from meta_model import make_meta, meta_download, meta_forward
from safetensors.torch import load_file

from weightops import api
from weightops.errors import CorruptInput, Differs, UsageError, WeightopsError
from weightops.ops.arrange import pairs_to_halves
from weightops.ops.stored import Checked

SMALL: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "vocab": 40}
SMALL |= {"parts": 2, "dtype": torch.float16}
GOLDEN = Path(__file__).parents[1] / "golden/knowlm"
REFERENCE = Path(__file__).parents[2] / ".venv-reference/bin/python"
CONTEXT = {"context_length": "2048"}


def meta(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    return make_meta(folder, **{**SMALL, **changes})


def convert(source: Path, out: Path, to: str, **options: Any) -> api.Result:
    return api.convert(source, out, to=to, **{"set": CONTEXT, **options})


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder as the reference libraries read them; of each part apart if there are several."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".bin", ".safetensors"))
    found: dict[str, torch.Tensor] = {}
    for path in files:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        parts = path.suffix == ".pth" and len(files) > 1
        found |= {f"{path.stem}/{name}" if parts else name: tensor for name, tensor in tensors.items()}
    return found


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same bits."""
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype
        and a.shape == right[name].shape
        and torch.equal(a.contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8))
        for name, a in left.items()
    )


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Parameters of `make_meta` for MHA, GQA and MQA, any vocabulary, 1 to 8 parts."""
    kv, group, half, parts = (draw(st.sampled_from(x)) for x in ((1, 2, 4, 8), (1, 2, 3), (1, 2, 5), (1, 2, 4, 8)))
    heads = kv * group
    embed_axis = draw(st.integers(0, 1))
    vocab = draw(st.integers(1, 12)) * (parts if draw(st.booleans()) else 1) + parts
    assume(heads % parts == 0 and (kv % parts == 0 or parts % kv == 0))
    assume(parts == 1 or embed_axis == 0 or heads * half * 2 % parts == 0)
    return {
        "dim": heads * half * 2,
        "n_layers": draw(st.integers(1, 2)),
        "n_heads": heads,
        "n_kv_heads": kv,
        "ffn_dim": parts * draw(st.integers(1, 40)),
        "vocab": vocab,
        "parts": parts,
        "dtype": draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))),
        "seed": draw(st.integers(0, 1000)),
        "embed_axis": embed_axis,
        "flat": draw(st.booleans()),
        "rope_freqs": False,
    }


ROUNDS = settings(
    max_examples=settings.default.max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WAYS = [("hf",), ("tencentpretrain",), ("llama_inference",), ("hf", "tencentpretrain", "hf"), ("tencentpretrain", "hf")]


@given(model=models(), way=st.sampled_from(WAYS), parts=st.sampled_from((1, 2, 4, 8)))
@ROUNDS
def test_round_trips_give_back_every_bit(model: dict[str, Any], way: tuple[str, ...], parts: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = make_meta(folder / "meta", **model)
        source = folder / "meta"
        for i, layout in enumerate(way):
            convert(source, folder / f"{i}", layout, set={**CONTEXT, "n_heads": str(model["n_heads"])})
            source = folder / f"{i}"
        convert(source, folder / "one", "meta", model_parallel=1)
        assert same(load(folder / "one"), whole)
        kv, heads = model["n_kv_heads"], model["n_heads"]
        if model["vocab"] % parts or heads % parts or model["ffn_dim"] % parts or (kv % parts and parts % kv):
            with pytest.raises(UsageError, match="cannot be divided among"):
                convert(source, folder / "parts", "meta", model_parallel=parts)
            return
        if model["dim"] % parts:
            return
        make_meta(folder / "expected", **{**model, "parts": parts, "embed_axis": 1, "flat": False})
        convert(source, folder / "parts", "meta", model_parallel=parts)
        assert same(load(folder / "parts"), load(folder / "expected"))
        convert(folder / "parts", folder / "again", "meta", model_parallel=1)
        assert same(load(folder / "again"), whole)


BYTES = {
    (8, 1, False): "e750857b9a59e9aed3a6e1049e8f738ceccf0d6ed1eea000fab7b17c95fc6cd4",
    (8, 4, True): "e750857b9a59e9aed3a6e1049e8f738ceccf0d6ed1eea000fab7b17c95fc6cd4",
    (2, 2, False): "3ae083d414454203ca2cb4c95ca319a56ff20e8ee180517524005b5b69c28503",
}
"""SHA-256 of the model.safetensors that transformers 4.47.1 made of these, by heads of k, parts and flat storage."""


def reference_model(folder: Path, kv: int, parts: int, flat: bool) -> Path:
    sizes = {"dim": 64, "n_heads": 8, "n_kv_heads": kv, "vocab": 96, "dtype": torch.bfloat16}
    meta(folder / "meta", **sizes, parts=parts, flat=flat)
    return folder / "meta"


@pytest.mark.parametrize(("kv", "parts", "flat"), BYTES)
def test_bytes_are_those_of_the_reference_converter(tmp_path: Path, kv: int, parts: int, flat: bool) -> None:
    convert(reference_model(tmp_path, kv, parts, flat), tmp_path / "hf", "hf")
    made = (tmp_path / "hf/model.safetensors").read_bytes()
    assert hashlib.sha256(made).hexdigest() == BYTES[kv, parts, flat]


@pytest.mark.slow
@pytest.mark.parametrize(("kv", "parts", "flat"), BYTES)
def test_the_reference_converter_itself_agrees(tmp_path: Path, kv: int, parts: int, flat: bool) -> None:
    if not REFERENCE.exists():
        pytest.skip("transformers 4.47.1 is not installed: make reference")
    source = reference_model(tmp_path, kv, parts, flat)
    script = Path(__file__).parents[1] / "reference_converter.py"
    subprocess.run([REFERENCE, script, source, tmp_path / "reference"], check=True, capture_output=True)
    convert(source, tmp_path / "hf", "hf")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("hf", "reference"))
    assert ours.read_bytes() == theirs.read_bytes()


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes with a converted model, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(ids).logits


LLAMA31 = {"theta": 500000.0, "scaled": True, "embed_axis": 0, "rope_freqs": False}
KINDS = {
    "mha": {"n_kv_heads": None},
    "gqa": {"n_kv_heads": 2},
    "mqa-4-parts": {"n_kv_heads": 1, "parts": 4},
    "code-llama": {"theta": 1e6},
    "llama-3.1": LLAMA31,
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_meta_does(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_heads": 4, "vocab": 96, "dtype": torch.float32, **KINDS[kind]}
    whole = meta(tmp_path / "meta", **sizes)
    settings = {**CONTEXT, **({"rope_factor": "8"} if "scaled" in sizes else {})}
    convert(tmp_path / "meta", tmp_path / "hf", "hf", set=settings)
    ids = torch.randint(0, 96, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = meta_forward(whole, json.loads((tmp_path / "meta/params.json").read_text()), ids)
    torch.testing.assert_close(logits_of(tmp_path / "hf", ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows, heads: rows,  # not reordered at all
        lambda rows, heads: pairs_to_halves(rows, 4),  # k with the heads of q
        lambda rows, heads: pairs_to_halves(pairs_to_halves(rows, heads), heads),  # twice
    ],
)
def test_another_rotary_order_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    whole = meta(tmp_path / "meta", dim=64, vocab=96, dtype=torch.float32)
    monkeypatch.setattr("weightops.layouts.hf.pairs_to_halves", wrong)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    ids = torch.arange(50)[None]
    expected = meta_forward(whole, json.loads((tmp_path / "meta/params.json").read_text()), ids)
    assert (logits_of(tmp_path / "hf", ids) - expected).abs().max() > 1e-3


def edit(folder: Path, **changes: Any) -> None:
    """Change params.json; `...` takes a key away."""
    path = folder / "params.json"
    params = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in params.items() if value is not ...}))


def save_part(folder: Path, part: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / f"consolidated.{part:02d}.pth"
    state_dict = torch.load(path)
    change(state_dict)
    torch.save(state_dict, path)


def keep_rows(folder: Path, name: str, rows: int) -> None:
    save_part(folder, 1, lambda tensors: tensors.update({name: tensors[name][:rows].clone()}))


def drop(folder: Path, name: str, *parts: int) -> None:
    for part in parts:
        save_part(folder, part, lambda tensors: tensors.pop(name))


def poison(folder: Path, name: str) -> None:
    for part in (0, 1):
        save_part(folder, part, lambda tensors: tensors[name][3].fill_(float("nan")))


def take_part_of(folder: Path, **changes: Any) -> None:
    meta(folder / "other", **changes)
    (folder / "other" / LAST).rename(folder / LAST)


def exchange_parts(folder: Path) -> None:
    for source, target in ((FIRST, "x"), (LAST, FIRST), ("x", LAST)):
        (folder / source).rename(folder / target)


FIRST, LAST = "consolidated.00.pth", "consolidated.01.pth"
Q, W1, NORM = "layers.0.attention.wq.weight", "layers.1.feed_forward.w1.weight", "layers.1.ffn_norm.weight"
Fault = tuple[Callable[[Path], Any], type[WeightopsError], str]
PARTS: dict[str, Fault] = {
    "the first missing": (lambda f: (f / FIRST).unlink(), CorruptInput, "holds the parts 01 of"),
    "the last missing": (lambda f: (f / LAST).unlink(), CorruptInput, "1 parts hold 128"),
    "one of another model": (lambda f: take_part_of(f, seed=7), CorruptInput, "01.pth has other values than"),
    "one of a wider model": (lambda f: take_part_of(f, dim=48), CorruptInput, "has other values|has float16"),
    "exchanged": (exchange_parts, CorruptInput, "was written as consolidated.01.pth"),
    "one too many": (lambda f: shutil.copy(f / LAST, f / "consolidated.02.pth"), CorruptInput, "was written as"),
    "a tensor in one alone": (lambda f: drop(f, Q, 1), CorruptInput, "is in consolidated.00.pth and not in"),
    "a tensor missing": (lambda f: drop(f, Q, 0, 1), CorruptInput, f"{Q} is missing"),
    "rows of q missing": (lambda f: keep_rows(f, Q, 9), CorruptInput, r"is \[25, 32\], the parameters say \[32, 32\]"),
    "rows of w1 missing": (lambda f: keep_rows(f, W1, 9), CorruptInput, r"is \[137, 32\], the parameters say"),
    "nan in a norm": (lambda f: poison(f, NORM), CorruptInput, f"{NORM} holds values that are no numbers"),
}
PARAMS: dict[str, tuple[dict[str, Any], type[WeightopsError], str]] = {
    "no heads": ({"n_heads": ...}, CorruptInput, "n_heads is None"),
    "wrong heads": ({"n_heads": 3}, CorruptInput, "3 heads"),
    "heads as text": ({"n_heads": "4"}, CorruptInput, "n_heads is '4'"),
    "half a head": ({"n_heads": 4.5}, CorruptInput, "expected a whole number"),
    "other heads of k": ({"n_kv_heads": 1}, CorruptInput, "the parts that repeat a head do not agree"),
    "other dim": ({"dim": 64}, CorruptInput, "params.json: feed-forward layers should have|the parameters say"),
    "fewer layers": ({"n_layers": 1}, UsageError, "is no tensor of a LLaMA model, and so are"),
    "more layers": ({"n_layers": 3}, CorruptInput, "layers.2.attention.wq.weight is missing"),
    "other vocabulary": ({"vocab_size": 41}, CorruptInput, "vocab_size is 41, the 2 parts hold 40"),
    "other rope_theta": ({"rope_theta": 5e5}, CorruptInput, "rope.freqs are not the frequencies of rope_theta 500000"),
    "mixture of experts": ({"moe": {"num_experts": 8}}, UsageError, "moe is no parameter of a LLaMA model"),
    "vision": ({"vision_chunk_size": 448}, UsageError, "vision_chunk_size is no parameter"),
    "scaled by an unknown factor": ({"use_scaled_rope": True}, UsageError, "by how much is not said"),
}
BAD: dict[str, Fault] = {
    **PARTS,
    "no params.json": (lambda f: (f / "params.json").unlink(), UsageError, "params.json: no such file"),
    "params.json no object": (lambda f: (f / "params.json").write_text("[]"), CorruptInput, "params.json"),
    **{name: (lambda f, c=c: edit(f, **c), error, words) for name, (c, error, words) in PARAMS.items()},
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, fault: str) -> None:
    spoil, error, words = BAD[fault]
    meta(tmp_path / "meta")
    spoil(tmp_path / "meta")
    with pytest.raises(error, match=words):
        convert(tmp_path / "meta", tmp_path / "out", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta"]


def test_the_context_length_is_asked_for_by_name(tmp_path: Path) -> None:
    meta(tmp_path / "meta")
    with pytest.raises(UsageError, match="for how long a context") as raised:
        convert(tmp_path / "meta", tmp_path / "hf", "hf", set={})
    assert raised.value.hint is not None
    assert "--set context_length=N" in raised.value.hint
    convert(tmp_path / "meta", tmp_path / "tp", "tencentpretrain", set={})  # which does not need it


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contextlength": "1"}, "unknown setting"),
        ({"context_length": "long"}, "is no int"),
        ({"context_length": "0"}, "not above zero"),
        ({"instruct": "1"}, "is no bool"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    meta(tmp_path / "meta")
    with pytest.raises(UsageError, match=words):
        convert(tmp_path / "meta", tmp_path / "hf", "hf", set=settings)


def test_params_may_be_nested(tmp_path: Path) -> None:
    whole = meta(tmp_path / "meta", rope_freqs=False)
    path = tmp_path / "meta/params.json"
    path.write_text(json.dumps({"model": json.loads(path.read_text()), "tokenizer": {}}))
    convert(tmp_path / "meta", tmp_path / "one", "meta", model_parallel=1)
    assert same(load(tmp_path / "one"), whole)


def test_every_tensor_is_used_or_named_with_the_reason(tmp_path: Path) -> None:
    meta(tmp_path / "meta")
    result = convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert result.manifest is not None
    assert list(result.manifest.recipe["dropped"]) == ["rope.freqs"]
    assert any("rope.freqs is left out: follows from the parameters" in warning for warning in result.warnings)


def test_checklist_is_checked_and_written(tmp_path: Path) -> None:
    meta(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "out", "meta", model_parallel=4)
    subprocess.run(["md5sum", "--check", "--quiet", "checklist.chk"], cwd=tmp_path / "out", check=True)
    listed = (tmp_path / "out/checklist.chk").read_text().split()[1::2]
    assert listed == [f"consolidated.{i:02d}.pth" for i in range(4)] + ["params.json"]
    convert(tmp_path / "out", tmp_path / "hf", "hf", check=True)
    edit(tmp_path / "out", norm_eps=1e-6)
    with pytest.raises(Differs, match="is not what its checklist"):
        convert(tmp_path / "out", tmp_path / "again", "hf", check=True)


def test_repeated_heads_are_held_against_each_other(tmp_path: Path) -> None:
    meta(tmp_path / "meta", parts=4, n_kv_heads=2)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.attention.wk.weight"][-1, -1] += 1

    save_part(tmp_path / "meta", 3, change)
    with pytest.raises(CorruptInput, match="parts that repeat a head do not agree: the values differ"):
        convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_casts_are_counted_per_tensor_and_recorded(tmp_path: Path) -> None:
    whole = meta(tmp_path / "meta", dtype=torch.float32, rope_freqs=False)
    whole["output.weight"][3, :5] = torch.tensor([1e9, -1e9, 1e-9, float("inf"), 3e-6])
    save_part(tmp_path / "meta", 0, lambda tensors: tensors["output.weight"].copy_(whole["output.weight"][:20]))
    result = convert(tmp_path / "meta", tmp_path / "hf", "hf", dtype="float16")
    assert result.manifest is not None
    loss, cast = result.manifest.losses["lm_head.weight"], whole["output.weight"].half().float()
    finite = cast.isfinite() & (whole["output.weight"] != 0)
    error = ((cast.double() - whole["output.weight"]).abs() / whole["output.weight"].abs())[finite].max().item()
    assert (loss.elements, loss.overflowed, loss.flushed, loss.infinite, loss.nan) == (40 * 32, 2, 1, 1, 0)
    assert loss.changed == int((cast != whole["output.weight"]).sum())
    assert loss.subnormal == int(((cast != 0) & (cast.abs() < 2**-14)).sum())
    assert loss.max_relative_error == pytest.approx(error)
    assert {tensor.dtype for tensor in load(tmp_path / "hf").values()} == {torch.float16}


def test_the_files_of_2023_come_back_from_metas(tmp_path: Path) -> None:
    """The raw model of KnowLM's golden files was written by transformers 4.28 under torch 1.12."""
    convert(GOLDEN / "raw", tmp_path / "meta", "meta", model_parallel=2)
    convert(tmp_path / "meta", tmp_path / "hf", "hf", format="torch-1.12", max_shard_size="150KB")
    for path in (GOLDEN / "raw").glob("*.bin"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_a_flat_storage_is_not_read_for_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta(tmp_path / "meta", flat=True)
    monkeypatch.setattr(Checked, "_crc_of_member", lambda self, read: pytest.fail("reads the whole file"))
    convert(tmp_path / "meta", tmp_path / "hf", "hf", dry_run=True)


def test_a_damaged_flat_storage_is_noticed(tmp_path: Path) -> None:
    whole = meta(tmp_path / "meta", flat=True)
    data = bytearray((tmp_path / "meta" / LAST).read_bytes())
    at = data.index(whole["layers.0.attention.wq.weight"][16:].numpy().tobytes()[:64])
    data[at] ^= 1
    (tmp_path / "meta" / LAST).write_bytes(data)
    with pytest.raises(CorruptInput, match="CRC-32"):
        convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_containers_change_alone_but_not_of_parts(tmp_path: Path, to: str) -> None:
    whole = meta(tmp_path / "one", parts=1)
    api.convert(tmp_path / "one", tmp_path / to, to=to)
    assert same(load(tmp_path / to), whole)
    meta(tmp_path / "two")
    with pytest.raises(UsageError, match="each file holds a part of every tensor"):
        api.convert(tmp_path / "two", tmp_path / "out", to=to)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("safetensors", {"format": "torch"}, "to safetensors and format torch contradict"),
        ("torch", {"format": "safetensors"}, "to torch and format safetensors contradict"),
        ("safetensors", {"from_": "hf"}, "has no use for from"),
        ("safetensors", {"dtype": "float16"}, "has no use for dtype"),
        ("torch", {"model_parallel": 2}, "has no use for model_parallel"),
        ("torch", {"set": CONTEXT}, "has no use for set"),
        ("torch", {"tokenizer": False}, "has no use for tokenizer"),
        ("meta", {"set": CONTEXT, "max_shard_size": "1GB"}, "is not divided by size"),
        ("meta", {"set": CONTEXT, "format": "safetensors"}, "always written as meta files, not safetensors"),
        ("gguf", {"set": CONTEXT, "format": "torch"}, "always written as gguf files, not torch"),
    ],
)
def test_options_without_a_use_are_refused(tmp_path: Path, to: str, options: dict[str, Any], message: str) -> None:
    meta_download(tmp_path / "one")
    with pytest.raises(UsageError, match=message):
        api.convert(tmp_path / "one", tmp_path / "out", to=to, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_torch_files_may_be_those_of_2022(tmp_path: Path) -> None:
    whole = meta(tmp_path / "one", parts=1)
    api.convert(tmp_path / "one", tmp_path / "out", to="torch", format="torch-1.12")
    assert same(load(tmp_path / "out"), whole)
