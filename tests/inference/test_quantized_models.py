"""Models that are quantised by GPTQ run as what their integers stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import quantize_tiny, save_tiny, text, trained

from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.folder import open_checkpoint
from weightops.inference.evaluate import evaluate
from weightops.inference.generate import Generation
from weightops.inference.packed import Engine
from weightops.inference.settings import Settings


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, torch.nn.Module, dict[str, torch.Tensor]]:
    """Folders `full` and `quantized`; the full model with the rounded weights, and these by name."""
    model = save_tiny(tmp_path / "full", "llama")
    weights = quantize_tiny(tmp_path / "full", tmp_path / "quantized")
    model.load_state_dict(weights, strict=False)
    return tmp_path, model, weights


def test_perplexity_and_text_are_those_of_the_rounded_weights(
    family: tuple[Path, torch.nn.Module, dict[str, torch.Tensor]],
) -> None:
    folder, model, _ = family
    ids = torch.tensor(trained().encode(text()).ids)
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        logs = model(windows).logits.log_softmax(-1)[:, :-1]
    expected = -float(logs.gather(2, windows[:, 1:, None]).double().mean())
    quantized = open_checkpoint(folder / "quantized")
    (score,) = evaluate([quantized], text(), seq_len=64).scores
    assert score.nll == pytest.approx(expected, rel=1e-6)
    prompt = torch.tensor([trained().encode("the stream").ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
    found = Generation(quantized, "the stream", settings=Settings(20))
    list(found)
    assert found.tokens == out[0, prompt.shape[1] :].tolist()


def test_sets_of_pt_files_by_a_pattern_generate(
    family: tuple[Path, torch.nn.Module, dict[str, torch.Tensor]],
) -> None:
    """As TigerBot shipped them: no index, and no word on the quantisation."""
    folder, _, _ = family
    state = load_file(folder / "quantized" / "model.safetensors")
    names = list(state)
    for i in (0, 1):
        part = {name: state[name] for name in names[i::2]}
        torch.save(part, folder / "full" / f"tigerbot-4bit-128g-{i + 1}.pt")
    (folder / "full" / "model.safetensors").unlink()
    expected = "".join(api.generate(folder / "quantized", "the stream", max_new_tokens=20, device="cpu"))
    found = api.generate(folder / "full" / "tigerbot-4bit-128g-*.pt", "the stream", max_new_tokens=20)
    assert "".join(found) == expected


def test_each_modules_output_error_is_on_its_own_inputs(
    family: tuple[Path, torch.nn.Module, dict[str, torch.Tensor]],
) -> None:
    folder, model, weights = family
    original = load_file(folder / "full" / "model.safetensors")
    ids = torch.tensor(trained().encode(text()).ids)
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in weights:
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        model(windows)
    found = evaluate(
        [open_checkpoint(folder / "quantized")], text(), seq_len=64, reference=open_checkpoint(folder / "full")
    )
    agreement = found.scores[1].agreement
    assert agreement is not None
    assert agreement.kl_mean > 0
    assert agreement.modules.keys() == {name.removesuffix(".weight") for name in weights}
    for name, error in agreement.modules.items():
        x, before, after = inputs[name].flatten(0, 1), original[f"{name}.weight"], weights[f"{name}.weight"]
        expected = (x @ (after - before).T).square().sum() / (x @ before.T).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3), name


@pytest.mark.parametrize("engine", ["dequantized", "packed"])
def test_biases_of_zeros_are_left_out_with_a_note_and_others_refused(tmp_path: Path, engine: Engine) -> None:
    """AutoGPTQ gave every layer one."""
    save_tiny(tmp_path / "full", "llama")
    quantize_tiny(tmp_path / "full", tmp_path / "quantized")
    expected = Generation(open_checkpoint(tmp_path / "quantized"), "the stream", settings=Settings(8), engine=engine)
    list(expected)
    state = load_file(tmp_path / "quantized" / "model.safetensors")
    biases = {n[:-7] + "bias": torch.zeros(t.shape[1]).half() for n, t in state.items() if n.endswith(".qweight")}
    biases["model.layers.0.mlp.up_proj.bias"] = -biases["model.layers.0.mlp.up_proj.bias"]

    def save() -> Checkpoint:
        save_file(state | biases, tmp_path / "quantized" / "model.safetensors", metadata={"format": "pt"})
        return open_checkpoint(tmp_path / "quantized")

    found = Generation(save(), "the stream", settings=Settings(8), engine=engine)
    list(found)
    assert found.tokens == expected.tokens
    assert found.warnings[-1].startswith("quantized: 21 biases of zeros are left out: model.layers.0.mlp.down_proj")
    (score,) = evaluate([open_checkpoint(tmp_path / "quantized")], text(), seq_len=64, engine=engine).scores
    assert score.engine == engine
    biases["model.layers.1.mlp.up_proj.bias"][5] = 1e-4
    with pytest.raises(IncompatibleInputs, match=r"holds model\.layers\.1\.mlp\.up_proj\.bias, which L") as caught:
        Generation(save(), "the stream", engine=engine)
    assert caught.value.hint is not None
    assert "mlp_bias" in caught.value.hint


def test_biases_of_zeros_of_a_plain_model_are_left_out_too(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    zeros = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}
    save_file({**model.state_dict(), **zeros}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Generation(open_checkpoint(tmp_path), "the stream")
    assert "1 biases of zeros are left out: model.layers.0.mlp.up_proj.bias" in found.warnings[0]


def test_a_reference_of_another_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "full", "llama")
    quantize_tiny(tmp_path / "full", tmp_path / "quantized")
    save_tiny(tmp_path / "other", "llama", intermediate_size=128)
    with pytest.raises(IncompatibleInputs, match=r"gate_proj of shape .* has no counterpart in other"):
        evaluate([open_checkpoint(tmp_path / "quantized")], text(), reference=open_checkpoint(tmp_path / "other"))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """Sums in one order."""
