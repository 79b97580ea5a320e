"""What mergekit 0.1.5 makes of the same merge files, in an environment of its own: `make mergekit`."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders as kinds
import torch
from environments import environment, run_script
from safetensors.torch import load_file, save_file
from small_tokenizers import mixed_strings
from tiny_models import save_tiny
from transformers import AutoTokenizer

import weightops

State = dict[str, torch.Tensor]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 3e-6, "float16": 2**-10, "bfloat16": 2**-7}
"""Of an element, or of the root of the mean square of its tensor where that is more."""
WEIGHTED = [{"model": "a", "parameters": {"weight": 0.6}}, {"model": "b", "parameters": {"weight": 0.3}}]
PLAIN = [{"model": "a"}, {"model": "b"}]
T = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
MERGES: Mapping[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": WEIGHTED},
    "slerp": {"merge_method": "slerp", "base_model": "a", "models": PLAIN, "parameters": {"t": T}},
    "ties": {"merge_method": "ties", "base_model": "base", "models": WEIGHTED, "parameters": {"density": 0.5}},
    "dare": {"merge_method": "dare_ties", "base_model": "base", "models": WEIGHTED, "parameters": {"density": 1}},
    "arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": WEIGHTED},
    "stock": {"merge_method": "model_stock", "base_model": "base", "models": PLAIN},
    "layers": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4]}]},
        ],
    },
}
EXACT = {"linear", "ties", "dare", "arithmetic", "layers"}
"""Which take no sums over whole tensors."""
MASKED: Mapping[str, dict[str, Any]] = {
    f"mask-{name}": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0}}],
        "parameters": {"weight": 1, "density": 0.5, "rescale": rescale},
    }
    for name, rescale in (("plain", False), ("rescaled", True))
}

pytestmark = pytest.mark.slow


def placed(value: Any, dtype: str) -> Any:
    """A merge file whose models are those of one type."""
    if isinstance(value, dict):
        is_model = ("model", "base_model")
        return {key: f"{each}-{dtype}" if key in is_model else placed(each, dtype) for key, each in value.items()}
    return [placed(each, dtype) for each in value] if isinstance(value, list) else value


def save_family(folder: Path) -> None:
    """A base and two models that were changed by a tenth, in each type."""
    save_tiny(folder / "base", "llama", num_hidden_layers=4)
    base = load_file(folder / "base/model.safetensors")
    config = json.loads((folder / "base/config.json").read_text())
    for seed, name in enumerate(("base", "a", "b")):
        random = torch.Generator().manual_seed(seed)
        state = {n: t + (seed > 0) * 0.1 * t.std() * torch.randn(t.shape, generator=random) for n, t in base.items()}
        for dtype, kind in DTYPES.items():
            own = folder / f"{name}-{dtype}"
            shutil.copytree(folder / "base", own)
            save_file({n: t.to(kind) for n, t in state.items()}, own / "model.safetensors", {"format": "pt"})
            (own / "config.json").write_text(json.dumps({**config, "dtype": dtype}))


def both(folder: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Write merge files, and what both programs make of them, into `ours` and `theirs`."""
    for name, document in files.items():
        (folder / f"{name}.yml").write_text(json.dumps(document))
    run_script(environment("mergekit"), "mergekit_merges.py", folder)
    with contextlib.chdir(folder):
        for name in files:
            weightops.merge(f"{name}.yml", f"ours/{name}", seed=1)


def tensors(folder: Path) -> State:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    save_family(folder)
    files = {f"{name}-{dtype}": placed(document, dtype) for name, document in MERGES.items() for dtype in DTYPES}
    both(folder, files | {name: placed(document, "float32") for name, document in MASKED.items()})
    return folder


def at_the_edge(folder: Path, dtype: str, name: str) -> torch.Tensor:
    """Where a change has the very size at which `density` 0.5 ends: which of those are kept is nobody's to say."""
    base, *others = (load_file(folder / f"{model}-{dtype}/model.safetensors")[name] for model in ("base", "a", "b"))
    sizes = [(other - base).abs().float() for other in others]
    edges = [size.flatten().sort(descending=True).values[int(0.5 * size.numel()) - 1] for size in sizes]
    return torch.stack([size == edge for size, edge in zip(sizes, edges, strict=True)]).any(dim=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MERGES)
def test_the_tensors_are_those_of_mergekit(family: Path, name: str, dtype: str) -> None:
    ours, theirs = (tensors(family / side / f"{name}-{dtype}") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for tensor, wanted in theirs.items():
        found = ours[tensor]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        counts = ~at_the_edge(family, dtype, tensor) if name == "ties" else torch.ones_like(wanted, dtype=torch.bool)
        assert wanted.ndim == 1 or counts.float().mean() > 0.8
        if name in EXACT:
            assert torch.equal(found[counts], wanted[counts]), tensor
        else:
            size = wanted.float().abs().clamp(min=wanted.float().square().mean().sqrt())
            assert ((found.float() - wanted.float()).abs() <= TOLERANCE[dtype] * size).all(), tensor


@pytest.mark.parametrize("name", MERGES)
def test_settings_say_the_same_of_the_model(family: Path, name: str) -> None:
    ours, theirs = (
        json.loads((family / side / f"{name}-bfloat16/config.json").read_text()) for side in ("ours", "theirs")
    )
    assert {**ours, "transformers_version": None} == {**theirs, "transformers_version": None}


def test_as_much_is_dropped_at_random(family: Path) -> None:
    base, a = (load_file(family / f"{name}-float32/model.safetensors") for name in ("base", "a"))
    sides = [tensors(family / side / "mask-plain") for side in ("ours", "theirs")]
    changed = [torch.cat([(side[n] != base[n]).flatten()[(a[n] != base[n]).flatten()] for n in base]) for side in sides]
    for each in changed:
        assert abs(each.sum().item() - 0.5 * len(each)) < 5.5 * math.sqrt(0.25 * len(each))
    assert abs((changed[0] == changed[1]).float().mean() - 0.5) < 5.5 * math.sqrt(0.25 / len(changed[0]))
    for tensor, before in base.items():
        sums = [
            (side[tensor] - before).abs().sum()
            for side in (a, *(tensors(family / s / "mask-rescaled") for s in ("ours", "theirs")))
        ]
        assert torch.allclose(torch.stack(sums[1:]), sums[0], rtol=1e-4), tensor


# ---- tokenizers


def with_bos(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A tokenizer.model whose settings say that texts begin with bos, as LLaMA's do; transformers 5 wants it said."""
    config = {**json.loads(files["tokenizer_config.json"]), "add_bos_token": True}
    return {**files, "tokenizer_config.json": json.dumps(config).encode()}


PAIRS: Mapping[str, tuple[Callable[[], Mapping[str, bytes]], ...]] = {
    "bpe-and-another": (kinds.smollm, kinds.tiny_llama),
    "added-tokens": (kinds.smollm, kinds.qwen),
    "chatml-on-a-base": (lambda: with_bos(kinds.spm()), lambda: with_bos(kinds.spm_chatml())),
    "sentencepiece-and-bpe": (kinds.spm_converted, kinds.tekken),
}


def save_speaker(folder: Path, files: Mapping[str, bytes], seed: int) -> None:
    """A model with a row of its own for every token of a tokenizer."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    rows = max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "config.json"}
    shutil.rmtree(folder)
    save_tiny(folder, "llama", seed, num_hidden_layers=1, vocab_size=rows)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    for name, data in kept.items():
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speakers")
    files = {}
    for name, makers in PAIRS.items():
        own = [f"{name}-{i}" for i in range(len(makers))]
        for seed, (place, make) in enumerate(zip(own, makers, strict=True)):
            save_speaker(folder / place, make(), seed)
        files[name] = {
            "merge_method": "linear",
            "base_model": own[0],
            "models": [{"model": place, "parameters": {"weight": 0.5}} for place in own],
            "tokenizer_source": "union",
        }
    both(folder, files)
    return folder


@pytest.mark.parametrize("pair", PAIRS)
def test_a_union_of_tokenizers_encodes_as_mergekits_does(speakers: Path, pair: str) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(speakers / side / pair) for side in ("ours", "theirs"))
    assert ours.get_vocab().keys() == theirs.get_vocab().keys()
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool\u00e9>", "</s>")
    for i, text in enumerate(mixed_strings()):
        text = text if i % 3 else special[i % 5] + text + special[i % 4]
        assert ours.convert_ids_to_tokens(ours(text).input_ids) == theirs.convert_ids_to_tokens(theirs(text).input_ids)


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_of_a_union_are_those_of_their_tokens(speakers: Path, pair: str) -> None:
    ours, theirs = (
        (tensors(speakers / s / pair), AutoTokenizer.from_pretrained(speakers / s / pair).get_vocab())
        for s in ("ours", "theirs")
    )
    sources = [speakers / f"{pair}-{i}" for i in range(2)]
    models = [(load_file(p / "model.safetensors"), AutoTokenizer.from_pretrained(p).get_vocab()) for p in sources]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token, number in ours[1].items():
            row = ours[0][name][number]
            assert torch.equal(row, theirs[0][name][theirs[1][token]]), token
            own = [state[name][ids[token]] for state, ids in models if token in ids]
            assert torch.allclose(row, torch.stack(own).mean(dim=0), atol=1e-6), token
