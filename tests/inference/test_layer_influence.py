"""Block influence and angular distances, against states that transformers' own model passes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, text
from transformers import AutoTokenizer, PreTrainedModel

import weightops
from weightops.formats.folder import open_checkpoint
from weightops.inference.evaluate import evaluate
from weightops.inference.figures import LayerFigures

TEXT = text(12)
SEQ_LEN = 32


def measured(folder: Path) -> LayerFigures:
    (score,) = evaluate([open_checkpoint(folder)], TEXT, seq_len=SEQ_LEN, influence=True).scores
    assert score.layers is not None
    return score.layers


@torch.no_grad()
def states(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """What enters each block, and what leaves the last, [blocks + 1, windows, tokens, hidden] in float64."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    windows = torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)
    blocks = model.get_submodule("transformer.h" if model.config.model_type == "bloom" else "model.layers")
    seen: list[torch.Tensor] = []
    for i, block in enumerate(blocks.children()):

        def look(_: object, args: tuple[torch.Tensor], output: object, i: int = i) -> None:
            after = output[0] if isinstance(output, tuple) else output
            assert isinstance(after, torch.Tensor)
            seen.extend([args[0], after] if i == model.config.num_hidden_layers - 1 else [args[0]])

        block.register_forward_hook(look)
    model.eval()(windows, use_cache=False)
    return torch.stack(seen).double()


@pytest.mark.parametrize("kind", ["llama", "bloom", "qwen2"])
def test_figures_are_those_of_the_states(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    expected = states(model, tmp_path)
    found = measured(tmp_path)
    unlike = 1 - torch.cosine_similarity(expected[:-1], expected[1:], dim=-1)
    depth = len(unlike)
    assert [each.value for each in found.influence] == pytest.approx(unlike.flatten(1).mean(1).tolist(), rel=1e-4)
    errors = unlike.flatten(1).std(1) / math.sqrt(unlike[0].numel())
    assert [each.error for each in found.influence] == pytest.approx(errors.tolist(), rel=1e-3)
    assert [len(row) for row in found.distances] == list(range(depth, 0, -1))
    ends = expected[:, :, -1]
    for n, row in enumerate(found.distances, start=1):
        angles = torch.cosine_similarity(ends[:-n], ends[n:], dim=-1).acos() / math.pi
        assert list(row) == pytest.approx(angles.mean(1).tolist(), rel=1e-4)
    assert found.windows == expected.shape[1]


def test_a_layer_that_changes_nothing_has_none(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{part}.weight"].zero_()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = measured(tmp_path)
    assert found.influence[1].value == 0
    assert found.distances[0][1] < 1e-7
    assert found.influence[0].value > 1e-3 < found.influence[2].value


def test_few_windows_are_kept_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    whole = measured(tmp_path)
    monkeypatch.setattr("weightops.inference.layer_influence._ENDS_NBYTES", 4 * 64 * 4 * 3)
    some = measured(tmp_path)
    assert (some.windows, some.influence) == (3, whole.influence)
    monkeypatch.setattr("weightops.inference.windows._BATCH_TOKENS", SEQ_LEN * 2)
    assert measured(tmp_path).distances[0] == pytest.approx(some.distances[0], rel=1e-5)


def test_documents_have_the_figures_of_every_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_tiny(tmp_path / name, "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    found = weightops.evaluate(
        tmp_path / "b", tmp_path / "text.txt", seq_len=SEQ_LEN, reference=tmp_path / "a", influence=True
    )
    documents = json.loads(json.dumps(found.to_json()))["models"]
    assert documents[0]["layers"] == documents[1]["layers"]
    assert len(documents[0]["layers"]["influence"]) == 3
