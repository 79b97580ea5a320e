"""Quantising whole small models: what comes out, what is refused, and that a killed run ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import weightops
from weightops.api.models import quantize
from weightops.cli.main import run
from weightops.cli.meter import human
from weightops.engine.control import Control
from weightops.errors import (
    CorruptInput,
    IncompatibleInputs,
    OutputExists,
    PlanDiffers,
    SourceMissing,
    UsageError,
    WeightopsError,
)
from weightops.formats.folder import open_checkpoint
from weightops.inference.generate import Generation
from weightops.inference.settings import Settings
from weightops.operations.cast.operation import cast
from weightops.quantization.run import _pattern, compute_dtype
from weightops.spec import DType

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"group_size": 32, "samples": 40, "seq_len": 64}
Models = Callable[[str], Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def files(folder: Path) -> dict[str, bytes]:
    """All files of an output but its manifest, which tells of when and where."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "weightops-manifest.json"}


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"sym": False, "static_groups": True}, {"bits": 3}])
def test_layers_are_solved_better_than_by_rounding_and_the_rest_stays(
    model: Models, text: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    source, out = model(kind), tmp_path / "out"
    done = quantize(source, out, calibration=[text], **SMALL, **options)
    before, after = tensors(source), tensors(out)
    layers = {m.module for m in done.modules}
    assert len(layers) == (21 if kind == "llama" else 8)
    assert sum(m.error for m in done.modules) < 0.9 * sum(m.error_rtn for m in done.modules)
    assert all(m.tokens == 40 * 64 and m.fallback is None for m in done.modules)
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in after:
            assert name not in after
            layers -= {module, f"transformer.{module}"}
        else:
            assert torch.equal(after.pop(name), tensor)
    assert layers == set()
    assert {name.rpartition(".")[2] for name in after} == {"qweight", "qzeros", "scales", "g_idx"}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert json.loads((out / "quantize_config.json").read_text()) == config
    assert (config["bits"], config["group_size"], config["sym"]) == (
        options.get("bits", 4),
        32,
        options.get("sym", True),
    )
    assert json.loads((out / "quantize_report.json").read_text())["modules"][0]["module"] == done.modules[0].module


def test_errors_are_those_of_the_layers_outputs(model: Models, text: Path, tmp_path: Path) -> None:
    """The report's error of the first layer, from its own inputs, which no other layer has changed."""
    source = model("llama")
    done = quantize(source, tmp_path / "out", calibration=[text], **SMALL)
    weightops.dequantize(tmp_path / "out", tmp_path / "back", dtype="float32")
    caught: list[torch.Tensor] = []
    net = AutoModelForCausalLM.from_pretrained(source)
    net.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    from weightops.formats.folder import open_checkpoint
    from weightops.inference.tokens import load_tokenizer
    from weightops.quantization.calibration import calibrate, read_texts

    windows = calibrate(load_tokenizer(open_checkpoint(source)), read_texts([text]), 40, 64, 0).tokens
    for window in windows:
        net(window[None])
    x = torch.cat(caught).double()
    name = "model.layers.0.self_attn.q_proj"
    own, back = (tensors(folder)[f"{name}.weight"].double() for folder in (source, tmp_path / "back"))
    expected = ((x @ (back - own).T).square().sum() / (x @ own.T).square().sum()).item()
    report = next(m for m in done.modules if m.module == name)
    assert report.error == pytest.approx(expected, rel=1e-4)


def test_rounding_needs_no_text(model: Models, tmp_path: Path) -> None:
    done = quantize(model("llama"), tmp_path / "out", method="rtn", group_size=-1, bits=8)
    assert all(m.error is None and m.tokens == 0 for m in done.modules)
    weightops.dequantize(tmp_path / "out", tmp_path / "back", dtype="float32")
    before, back = tensors(model("llama")), tensors(tmp_path / "back")
    for name, tensor in before.items():
        assert (back[name] - tensor).abs().max() <= tensor.abs().max() / 127


@pytest.mark.parametrize("container", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"act_order": True, "static_groups": True}])
def test_other_containers_hold_the_same_integers(
    model: Models, text: Path, tmp_path: Path, container: Any, options: dict[str, Any]
) -> None:
    for name, form in (("gptq", "gptq_v2"), ("other", container)):
        quantize(model("llama"), tmp_path / name, calibration=[text], checkpoint_format=form, **SMALL, **options)
        weightops.dequantize(tmp_path / name, tmp_path / f"{name}-back", dtype="float32")
    back, other = tensors(tmp_path / "gptq-back"), tensors(tmp_path / "other-back")
    assert back.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in back.items())
    assert not (tmp_path / "other" / "quantize_config.json").exists()
    config = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == container


def test_scales_of_compressed_tensors_have_the_models_type_before_weights_are_rounded(
    model: Models, tmp_path: Path
) -> None:
    """So loaders that give them this type change nothing."""
    cast_model = tmp_path / "bfloat16"
    weightops.cast(model("llama"), cast_model, dtype="bfloat16")
    options: dict[str, Any] = {"method": "rtn", "group_size": 32, "mse": False}
    done = quantize(cast_model, tmp_path / "ct", checkpoint_format="compressed-tensors", **options)
    assert done.result is not None
    assert not any("round" in text for text in done.result.warnings)
    scales = {n: t for n, t in tensors(tmp_path / "ct").items() if n.endswith("weight_scale")}
    assert {t.dtype for t in scales.values()} == {torch.bfloat16}
    plain = tensors(cast_model)
    weightops.dequantize(tmp_path / "ct", tmp_path / "back", dtype="float32")
    for name, tensor in tensors(tmp_path / "back").items():
        scale = scales.get(f"{name}_scale")
        if scale is not None:
            steps = ((tensor - plain[name].float()) / scale.float().repeat_interleave(32, 1)).abs()
            assert steps.max() <= 0.5 + 8 * 2**-8  # of the greatest, which is eight steps, whose type has eight bits


REFUSED_CONTAINERS = [
    ({"checkpoint_format": "awq", "bits": 8}, "awq holds 4 bits, not 8"),
    ({"checkpoint_format": "awq", "act_order": True}, "which --act-order changes"),
    ({"checkpoint_format": "compressed-tensors", "act_order": True}, "which --act-order changes"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED_CONTAINERS)
def test_what_a_container_cannot_hold_is_refused_before_work(
    model: Models, text: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        quantize(model("llama"), tmp_path / "out", calibration=[text], **SMALL, **options)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_layers_that_only_gptq_has_are_refused_before_work(model: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a Conv1D of transformers, which gptq alone holds"):
        quantize(model("gpt2"), tmp_path / "out", method="rtn", group_size=32, checkpoint_format="awq")
    assert list(tmp_path.iterdir()) == []


class _Stop(Exception):
    """A run that dies."""


class _DiesIn(Control):
    """Lets so many checks pass."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self._left = checks

    def check(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _Stop


@pytest.fixture(scope="module")
def undisturbed(model: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model whose quantising nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(model("llama"), out, calibration=[text], **SMALL)
    return files(out)


@pytest.mark.parametrize("checks", [3, 20, 33, 46])
def test_a_run_that_died_continues_at_its_block_and_ends_with_the_same_bytes(
    model: Models, undisturbed: dict[str, bytes], text: Path, tmp_path: Path, checks: int
) -> None:
    source = model("llama")
    with pytest.raises(_Stop):
        quantize(source, tmp_path / "out", calibration=[text], control=_DiesIn(checks), **SMALL)
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", calibration=[text], **SMALL)
    assert files(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out.blocks").exists()


def test_another_run_does_not_continue_it(model: Models, text: Path, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        quantize(model("llama"), tmp_path / "out", calibration=[text], control=_DiesIn(30), **SMALL)
    with pytest.raises(PlanDiffers, match=r"options.settings.bits was 4, now 3"):
        quantize(model("llama"), tmp_path / "out", calibration=[text], bits=3, **SMALL)
    quantize(model("llama"), tmp_path / "out", calibration=[text], bits=3, restart=True, **SMALL)


GLOBS = [
    "*.mlp.*",
    "model.layers.?.self_attn.[qk]_proj",
    "model.layers.[01].*",
    "*[!0-1].mlp.up_proj",
    "*.[]q]_proj",
    "model.layers.1.mlp.up_proj",
    "*layers[.]2*",
]


@pytest.mark.parametrize("glob", GLOBS)
def test_skipped_layers_are_those_that_dynamic_names(model: Models, tmp_path: Path, glob: str) -> None:
    """As GPTQModel reads it: a regular expression that is to match at the beginning."""
    source = open_checkpoint(model("llama"))
    everything = {n.removesuffix(".weight") for n in source if n.endswith("_proj.weight")}
    done = quantize(model("llama"), tmp_path / "out", method="rtn", group_size=32, mse=False, skip=[glob])
    skipped = everything - {report.module for report in done.modules}
    assert skipped == {name for name in everything if fnmatchcase(name, glob)}
    stated = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "quantize_config.json")]
    for dynamic in (stated[0]["quantization_config"]["dynamic"], stated[1]["dynamic"]):
        (pattern,) = dynamic
        assert pattern.startswith("-:")
        assert {name for name in everything if re.match(pattern[2:], name)} == skipped
    found = Generation(open_checkpoint(tmp_path / "out"), "the stream", settings=Settings(2))
    list(found)
    assert len(found.tokens) == 2


@pytest.mark.parametrize("glob", ["q_proj", "*.[!_proj", "*norm*", "*[]x]*", "*.[q-k]_proj"])
def test_a_glob_that_skips_nothing_is_refused(model: Models, tmp_path: Path, glob: str) -> None:
    with pytest.raises(UsageError, match=r"no layer matches --skip"):
        quantize(model("llama"), tmp_path / "out", method="rtn", skip=["*.mlp.*", glob])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"calibration": "text"}, {"act_order": True}, {"static_groups": True}])
def test_rounding_has_no_use_for_what_solves(model: Models, tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(option))} has no use with method rtn"):
        quantize(model("llama"), tmp_path / "out", method="rtn", **option)


@given(st.text("ab.[]!-*?^\\", max_size=8), st.lists(st.text("ab.[]!-^\\", max_size=6), min_size=5))
def test_patterns_match_what_globs_do(glob: str, names: list[str]) -> None:
    assert [bool(re.match(_pattern(glob), name)) for name in names] == [fnmatchcase(name, glob) for name in names]


def test_the_default_window_is_at_most_what_the_model_was_made_for(model: Models, text: Path, tmp_path: Path) -> None:
    done = quantize(model("llama"), tmp_path / "out", calibration=[text], group_size=32, samples=3, mse=False)
    assert {module.tokens for module in done.modules} == {3 * 128}
    with pytest.raises(UsageError, match=r"has \d+ tokens, one sample is to have 2048"):
        quantize(model("bloom"), tmp_path / "bloom", calibration=[tiny_text(tmp_path)], group_size=32)


def tiny_text(folder: Path) -> Path:
    (folder / "few.txt").write_text("A few words.")
    return folder / "few.txt"


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_estimate_is_what_is_written_and_held(model: Models, text: Path, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"calibration": [text], **SMALL}
    estimate = quantize(model(kind), tmp_path / "out", dry_run=True, **options).estimate
    assert not (tmp_path / "out").exists()
    done = quantize(model(kind), tmp_path / "out", **options)
    assert estimate == done.estimate
    written = open_checkpoint(tmp_path / "out")
    packed = [t for n, t in written.items() if n.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")]
    assert estimate.n_modules == len(done.modules) == len(packed) // 4
    assert estimate.n_blocks == len({module.module.split(".")[2] for module in done.modules})
    assert estimate.packed_nbytes == sum(tensor.nbytes for tensor in packed)
    assert estimate.hidden_nbytes == 40 * 64 * 64 * 4
    widest = max(module.in_features for module in done.modules)
    blocks: dict[str, int] = {}
    outputs: dict[str, int] = {}
    for name, tensor in open_checkpoint(model(kind)).items():
        if ".layers." in name:
            blocks[name.split(".")[2]] = blocks.get(name.split(".")[2], 0) + tensor.spec.numel * 4
    for module in done.modules:
        outputs[module.module.split(".")[2]] = outputs.get(module.module.split(".")[2], 0) + module.out_features
    assert estimate.memory_nbytes == max(blocks.values()) + 3 * widest**2 * 4 + (1 << 30)
    assert estimate.kept_nbytes == 40 * 64 * max(outputs.values()) * 4


def test_dry_run_shows_the_estimate(
    model: Models, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    estimate = quantize(model("llama"), tmp_path / "out", dry_run=True, calibration=[text], **SMALL).estimate
    line = ["quantize", str(model("llama")), "--out", str(tmp_path / "out"), "--calibration", str(text), "--dry-run"]
    line += ["--group-size", "32", "--samples", "40", "--seq-len", "64"]
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["estimate"]) == ("weightops-quantize/1", vars(estimate))
    assert (found["output"], found["bits_per_weight"], found["modules"]) == (None, None, [])
    assert run(line) == 0
    shown = capsys.readouterr().out
    assert f"layers   21 in 3 blocks, {human(estimate.packed_nbytes)} when packed" in shown
    assert f"at most {human(estimate.memory_nbytes)}, and up to {human(estimate.kept_nbytes)} more" in shown
    assert human(2 * estimate.packed_nbytes + 2 * estimate.hidden_nbytes) in shown


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"group_size": 48},
            UsageError,
            r"layers do not fit.*inputs by 48; model.layers.0.self_attn.q_proj is 64 x 64",
        ),
        ({"bits": 5}, UsageError, "5 bits"),
        ({"calibration": ()}, UsageError, "GPTQ needs text"),
        ({"seq_len": 129}, UsageError, "was made for 128 tokens, one sample is to have 129"),
        ({"skip": ["*"]}, UsageError, "no linear layer"),
        ({"device": "cuda:99"}, UsageError, "--device"),
    ],
)
def test_what_cannot_be_done_is_refused_before_work_starts(
    model: Models, text: Path, tmp_path: Path, options: dict[str, Any], kind: type[WeightopsError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        quantize(model("llama"), tmp_path / "out", **{"calibration": [text], **SMALL, **options})
    assert list(tmp_path.iterdir()) == []


def test_sources_that_cannot_be_quantised_are_refused(model: Models, text: Path, tmp_path: Path) -> None:
    quantize(model("llama"), tmp_path / "out", method="rtn", group_size=32)
    with pytest.raises(IncompatibleInputs, match="is quantised already"):
        quantize(tmp_path / "out", tmp_path / "again", calibration=[text], **SMALL)
    with pytest.raises(OutputExists, match="out exists"):
        quantize(model("llama"), tmp_path / "out", calibration=[text], **SMALL)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model("llama") / name).read_bytes())
    with pytest.raises(SourceMissing, match="has no tokenizer"):
        quantize(bare, tmp_path / "again", calibration=[text], **SMALL)


def test_a_model_that_gives_nan_is_refused(model: Models, text: Path, tmp_path: Path) -> None:
    state = tensors(model("llama"))
    state["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model("llama").glob("*.json"):
        (broken / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import save_file

    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightopsError, match=r"model.layers.0.mlp.down_proj.* NaN or infinity"):
        quantize(broken, tmp_path / "out", calibration=[text], **SMALL)


def test_fewer_tokens_than_columns_are_warned_of(model: Models, text: Path, tmp_path: Path) -> None:
    done = quantize(model("llama"), tmp_path / "out", calibration=[text], group_size=32, samples=1, seq_len=64)
    assert done.result is not None
    assert any("64 calibration tokens are fewer than the 96 inputs" in warning for warning in done.result.warnings)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_gpu_computes_in_the_type_of_the_weights(model: Models, dtype: str) -> None:
    source = cast(weightops.open_checkpoint(model("llama")), dtype=DType(dtype))
    assert compute_dtype(source, "cuda") == getattr(torch, dtype)
    assert compute_dtype(source, "cpu") == torch.float32


def test_modules_are_never_split_over_files(model: Models, tmp_path: Path) -> None:
    quantize(model("llama"), tmp_path / "out", method="rtn", group_size=32, max_shard_size="6KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    places: dict[str, set[str]] = {}
    for name, file in index.items():
        if "proj" in name:
            places.setdefault(name.rpartition(".")[0], set()).add(file)
    assert len(set().union(*places.values())) > 5
    assert all(len(found) == 1 for found in places.values())


def test_packed_tensors_stay_in_the_shards_of_their_weights(model: Models, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    weightops.shard(model("llama"), source, max_shard_size="100KB")
    quantize(source, out, method="rtn", group_size=32, max_shard_size="source")
    before = {path.name: set(load_file(path)) for path in source.glob("*.safetensors")}
    assert len(before) > 2
    for path in out.glob("*.safetensors"):
        weights = {
            name if name in before[path.name] else f"{name.rpartition('.')[0]}.weight" for name in load_file(path)
        }
        assert weights == before.pop(path.name)
    assert before == {}


def test_the_manifest_says_of_what_and_with_what_it_was_made(model: Models, text: Path, tmp_path: Path) -> None:
    source, out = model("llama"), tmp_path / "out"
    quantize(source, out, calibration=[text], seed=7, card=True, **SMALL)
    made = json.loads((out / "weightops-manifest.json").read_text())
    step = made["recipe"]["tensors"]["quantized"]["quantize"]
    assert step["calibration"] == [{"name": text.name, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}]
    assert {key: step[key] for key in ("bits", "group_size", "samples", "seq_len", "seed", "method")} == {
        **{"bits": 4, "group_size": 32, "samples": 40},
        **{"seq_len": 64, "seed": 7, "method": "gptq"},
    }
    expected = weightops.manifest(source).content_id
    assert made["sources"] == {"source": {"name": source.name, "content_id": expected}}
    card = (out / "README.md").read_text()
    assert "It is quantised: gptq, 4 bits, in groups of 32." in card
    assert f"made from `{source.name}`" in card


def test_a_source_that_is_not_what_its_manifest_says_is_not_quantised(
    model: Models, text: Path, tmp_path: Path
) -> None:
    """Also in the layers that only the solver reads."""
    source = tmp_path / "source"
    shutil.copytree(model("llama"), source)
    assert run(["manifest", str(source), "-q"]) == 0
    path = source / "model.safetensors"
    state = load_file(path)
    next(tensor for name, tensor in state.items() if name.endswith("q_proj.weight")).view(-1)[0] += 1
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CorruptInput, match=r"q_proj\.weight is not what weightops-manifest\.json beside it says"):
        quantize(source, tmp_path / "out", method="rtn", group_size=32)
    assert not (tmp_path / "out").exists()
