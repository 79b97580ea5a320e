"""Quantised models whose weights stay packed give what they give dequantised, in the memory of their integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gptq_models import Scheme, bloom, llama, quantised, without
from support import evaluate_all
from tiny_models import quantize_tiny, save_tiny, text
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from weightops_kernels import cpu
from weightops_kernels.linear import QuantLinear

import weightops
from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, NoRoom, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.formats.quantized.gptq import with_config
from weightops.inference.evaluate import evaluate
from weightops.inference.generate import Generation
from weightops.inference.model import BlockModel
from weightops.inference.packed import Engine
from weightops.inference.settings import Settings
from weightops.operations.dequantize import dequantize
from weightops.spec import DType

TOKENS = torch.arange(3, 27).view(2, 12)


def logits(checkpoint: Checkpoint, dtype: torch.dtype, *, packed: bool) -> torch.Tensor:
    """Float32 logits `[2, 12, vocab]`; the layers that should be packed are looked at."""
    if not packed:  # kernels multiply with the integers, which nothing has rounded
        checkpoint = dequantize(checkpoint, dtype=DType.F32, evaluate=evaluate_all)
    model = BlockModel(checkpoint, dtype=dtype)
    if packed:
        model.keep_packed()
    with model.loaded("", *model.blocks), torch.no_grad():
        kernels = [module for module in model.module.modules() if isinstance(module, QuantLinear)]
        assert len(kernels) == (len(model.quantized) if packed else 0)
        found: torch.Tensor = model.module(TOKENS, use_cache=False).logits
    assert all(p.device.type == "meta" for p in model.module.parameters())
    assert not any(isinstance(module, QuantLinear) for module in model.module.modules())
    return found.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


SCHEMES = {
    "2 bits": Scheme(bits=2),
    "3 bits, act-order": Scheme(bits=3, shuffled=True),
    "4 bits, zeros at both ends, v2": Scheme(sym=False, ends=True, checkpoint_format="gptq_v2"),
    "4 bits, act-order": Scheme(shuffled=True),
    "8 bits, one group": Scheme(bits=8, group_size=-1, sym=False),
}


@pytest.mark.parametrize("make", [llama, bloom])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_float32_logits_are_those_of_the_dequantised_model(scheme: Scheme, make: Any) -> None:
    checkpoint = quantised(make(), scheme).checkpoint
    expected = logits(checkpoint, torch.float32, packed=False)
    found = logits(checkpoint, torch.float32, packed=True)
    assert relative(found, expected) < 2e-6
    if make is llama and not scheme.shuffled:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_experts_and_transposed_layers_stay_packed_too(tmp_path: Path, kind: str) -> None:
    save_tiny(tmp_path / "full", kind)
    weightops.quantize(tmp_path / "full", tmp_path / "quantized", method="rtn", group_size=32, mse=False)
    checkpoint = open_checkpoint(tmp_path / "quantized")
    expected = logits(checkpoint, torch.float32, packed=False)
    assert relative(logits(checkpoint, torch.float32, packed=True), expected) < 2e-6


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(shuffled=True), Scheme(bits=3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_as_far_from_float32_as_dequantised_weights_are(scheme: Scheme, dtype: torch.dtype) -> None:
    checkpoint = quantised(llama(), scheme).checkpoint
    exact = logits(checkpoint, torch.float32, packed=False)
    found = relative(logits(checkpoint, dtype, packed=True), exact)
    assert found < {torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    assert found < 2 * relative(logits(checkpoint, dtype, packed=False), exact)


def test_old_files_without_g_idx_and_config() -> None:
    found = without(quantised(llama(), Scheme(group_size=-1)), ".g_idx")
    bare = replace(found.checkpoint, sidecars={"config.json": found.checkpoint.sidecars["config.json"]})
    bare = bare.with_config(lambda config: {k: v for k, v in config.items() if k != "quantization_config"})
    expected = logits(bare, torch.float32, packed=False)
    assert torch.equal(logits(bare, torch.float32, packed=True), expected)


def test_zero_points_that_gptqmodel_wrote_with_a_carry() -> None:
    """It subtracts ones from whole words, so that a zero point of 0 borrows from the next."""
    made = quantised(llama(), Scheme(sym=False, ends=True, checkpoint_format="gptq_v2"))
    expected = logits(made.checkpoint, torch.float32, packed=False)
    state = {name: t - 0x11111111 if name.endswith("qzeros") else t for name, t in made.state.items()}
    by = {"quantizer": ["gptqmodel:7.7.0"]}
    config = msgspec.structs.replace(made.scheme.config, checkpoint_format="gptq", meta=by)
    carried = with_config(replace(made, state=state).checkpoint, config)
    assert torch.equal(logits(carried, torch.float32, packed=True), expected)


def test_memory_is_that_of_the_integers_and_is_given_back() -> None:
    for scheme, dtype in ((Scheme(), torch.bfloat16), (Scheme(bits=3, shuffled=True), torch.float32)):
        model = BlockModel(quantised(bloom(), scheme).checkpoint, dtype=dtype)
        full = model.nbytes(model.blocks[0])
        model.keep_packed()
        with model.loaded(model.blocks[0]):
            block = model.module.get_submodule(model.blocks[0])
            held = sum(t.nbytes for t in [*block.parameters(), *block.buffers()])
        assert 0.9 * model.nbytes(model.blocks[0]) < held <= model.nbytes(model.blocks[0]) < full / 2
        with model.loaded(""):
            assert model.nbytes("") == sum(t.nbytes for t in model.module.parameters() if t.device.type != "meta")


@pytest.mark.parametrize(("part", "value"), [("scales", float("nan")), ("g_idx", 77), ("g_idx", -1)])
def test_damaged_tensors_give_the_errors_of_dequantising(part: str, value: float) -> None:
    made = quantised(llama(), Scheme())
    name = f"model.layers.1.mlp.down_proj.{part}"
    state = {n: t.clone() if n == name else t for n, t in made.state.items()}
    state[name].view(-1)[-1] = value
    said = []
    for packed in (False, True):
        with pytest.raises(CorruptInput, match=r"names group|holds NaN or infinity") as caught:
            logits(replace(made, state=state).checkpoint, torch.float32, packed=packed)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert name in said[0]


def generated(checkpoint: Checkpoint, engine: Engine, **options: Any) -> Generation:
    found = Generation(checkpoint, "the stream", settings=Settings(12), engine=engine, **options)
    list(found)
    return found


def test_generate_keeps_packed_what_does_not_fit_otherwise(folders: Path) -> None:
    checkpoint = open_checkpoint(folders / "quantized")
    plain = generated(checkpoint, "auto")
    assert (plain.engine, plain.saves_memory, plain.streams_weights) == ("dequantized", False, False)
    asked = generated(checkpoint, "packed")
    loading = asked._placement.nbytes - asked.whole_nbytes
    beside = asked._opened.beside_nbytes(len(asked.prompt_tokens) + 12) + loading
    saving = generated(checkpoint, "auto", max_nbytes=asked.whole_nbytes + beside)
    assert (saving.engine, saving.saves_memory, saving.streams_weights) == ("packed", True, False)
    streaming = generated(checkpoint, "auto", max_nbytes=asked.whole_nbytes + beside - 1)
    assert (streaming.engine, streaming.streams_weights) == ("packed", True)
    with pytest.raises(NoRoom, match="one block with embedding, head and cache takes") as caught:
        generated(checkpoint, "dequantized", max_nbytes=asked.whole_nbytes + beside)
    assert "--engine packed" in str(caught.value.hint)
    assert plain.tokens == asked.tokens == saving.tokens == streaming.tokens


@pytest.mark.skipif(not cpu.has_fast_int4(), reason="torch has no vectorised four-bit operator here")
def test_generate_keeps_packed_what_is_faster_so(folders: Path) -> None:
    checkpoint = open_checkpoint(folders / "quantized")
    assert generated(checkpoint, "auto", dtype=torch.bfloat16).engine == "packed"
    assert generated(checkpoint, "auto", dtype=torch.float16).engine == "dequantized"
    quantize_tiny(folders / "full", folders / "three", bits=3)
    assert generated(open_checkpoint(folders / "three"), "auto", dtype=torch.bfloat16).engine == "dequantized"


def test_eval_by_kernels_gives_the_scores_and_the_errors_of_modules(folders: Path) -> None:
    quantized, full = open_checkpoint(folders / "quantized"), open_checkpoint(folders / "full")
    plain, packed = (
        evaluate([quantized], text(20), seq_len=32, reference=full, engine=engine).scores[1]
        for engine in ("dequantized", "packed")
    )
    assert (plain.engine, packed.engine) == ("dequantized", "packed")
    assert packed.nll == pytest.approx(plain.nll, rel=1e-4)  # kernels round nothing
    assert plain.agreement is not None
    assert packed.agreement is not None
    assert packed.agreement.modules == pytest.approx(plain.agreement.modules, rel=1e-3)
    among = evaluate([full, quantized], text(20), seq_len=32, engine="packed")
    assert [score.engine for score in among.scores] == [None, "packed"]


def test_packed_is_refused_where_nothing_is_packed(folders: Path) -> None:
    with pytest.raises(UsageError, match="full: holds no quantised layer whose weights could stay packed"):
        api.generate(folders / "full", "the stream", engine="packed")
    with pytest.raises(UsageError, match="full: holds no quantised layer whose weights could stay packed"):
        evaluate([open_checkpoint(folders / "full")], text(20), engine="packed")


def falcon() -> FalconForCausalLM:
    config = FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True, alibi=False
    )
    torch.manual_seed(0)
    return FalconForCausalLM(config).half().eval()


def test_a_linear_with_a_forward_of_its_own_that_says_the_same_stays_packed() -> None:
    checkpoint = quantised(falcon(), Scheme()).checkpoint
    expected = logits(checkpoint, torch.float32, packed=False)
    assert relative(logits(checkpoint, torch.float32, packed=True), expected) < 2e-6


@pytest.mark.parametrize("forward", [lambda self, x: x @ self.weight.T * 2, lambda self, x: (x, x), lambda self: None])
def test_layers_that_are_no_plain_linear_ones_are_dequantised(monkeypatch: pytest.MonkeyPatch, forward: Any) -> None:
    monkeypatch.setattr(FalconLinear, "forward", forward)
    found = BlockModel(quantised(falcon(), Scheme()).checkpoint)
    assert len(found.quantized) == 8
    assert found.packable == {}
    found.keep_packed()
    assert "8 of 8 quantised layers are dequantised" in found.warnings[-1]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders `full` and `quantized`."""
    save_tiny(tmp_path / "full", "llama")
    quantize_tiny(tmp_path / "full", tmp_path / "quantized")
    return tmp_path


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """Sums in one order."""
