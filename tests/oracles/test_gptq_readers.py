"""What others make of GPTQ folders that weightops writes, and weightops of theirs, each in an environment of its own.

The tolerances are those of what each computes in: auto-gptq with the exact weights in float32, transformers with those
rounded to float16, which is what `dequantize` writes by default, gptqmodel in float16 throughout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from environments import environment, run_script
from gptq_models import Scheme, bloom, llama, quantised, rounded

import weightops
from weightops.formats.quantized.gptq import write_module
from weightops.ops.numbers.bitpack import BITS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
AUTOGPTQ, GPTQMODEL = environment("autogptq"), environment("gptqmodel")
TOKENS = torch.arange(40).reshape(2, 20)

PLAIN = Scheme()
SCHEMES = {
    "plain": PLAIN,
    "act-order": Scheme(shuffled=True),
    "asymmetric": Scheme(sym=False, ends=True),
    "asymmetric-v2": Scheme(sym=False, ends=True, checkpoint_format="gptq_v2", shuffled=True),
    "one-group": Scheme(group_size=-1),
    **{f"{bits}-bit": Scheme(bits=bits) for bits in (2, 3, 8)},
}
MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "bloom": bloom}


def our_logits(folder: Path, out: Path, dtype: str = "float32") -> np.ndarray:
    """Those of the folder dequantised to `dtype`, as transformers computes them in float32."""
    weightops.dequantize(folder, out, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    found = found.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def add_tokenizer(folder: Path) -> None:
    """One with a word for each token; gptqmodel loads no model without."""
    words = {f"t{i}": i for i in range(96)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t0"}
    document = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(document))


def write_all(folder: Path, names: Sequence[str], store_head: bool) -> dict[str, Path]:
    """A folder for each model and scheme, and one in many files; `store_head`: also if it is the embedding."""
    folders = {}
    for model, make in MODELS.items():
        for name in (*names, "sharded"):
            target = folders[f"{model}-{name}"] = folder / f"{model}-{name}"
            found = quantised(make(), SCHEMES.get(name, PLAIN))
            if store_head and "lm_head.weight" not in found.state:
                head = found.state["transformer.word_embeddings.weight"]
                found = replace(found, state={**found.state, "lm_head.weight": head.clone()})
            found.save(target, max_shard_size=20_000 if name == "sharded" else "5GB")
            add_tokenizer(target)
    return folders


def compare(
    tmp_path: Path,
    environment: Path,
    script: str,
    names: Sequence[str],
    tolerance: float,
    dtype: str = "float32",
    store_head: bool = False,
) -> None:
    """Hold the logits of others against ours with weights in `dtype`; fails with all that differ by more."""
    folders = write_all(tmp_path, names, store_head)
    run_script(environment, script, *(a for n, folder in folders.items() for a in (folder, tmp_path / f"{n}.npy")))
    found = {
        name: error(np.load(tmp_path / f"{name}.npy"), our_logits(folder, tmp_path / f"{name}-plain", dtype))
        for name, folder in folders.items()
    }
    print(script, json.dumps(found, indent=1))
    assert {name: value for name, value in found.items() if not value <= tolerance} == {}


def test_autogptq_computes_our_logits_exactly(tmp_path: Path) -> None:
    # It leaves a tied head that is not stored as it finds it in memory.
    compare(
        tmp_path, AUTOGPTQ, "autogptq_logits.py", [n for n in SCHEMES if n != "asymmetric-v2"], 1e-6, store_head=True
    )


@pytest.mark.slow
def test_transformers_computes_our_logits(tmp_path: Path) -> None:
    compare(tmp_path, GPTQMODEL, "transformers_logits.py", [n for n in SCHEMES if n != "asymmetric"], 1e-5, "float16")


@pytest.mark.slow
def test_gptqmodel_computes_our_logits(tmp_path: Path) -> None:
    compare(tmp_path, GPTQMODEL, "gptqmodel_logits.py", [n for n in SCHEMES if n != "asymmetric"], 5e-3)


@pytest.mark.parametrize(
    ("environment", "script", "checkpoint_format"),
    [
        (AUTOGPTQ, "autogptq_pack.py", "gptq"),
        pytest.param(GPTQMODEL, "gptqmodel_pack.py", "gptq_v2", marks=pytest.mark.slow),
    ],
    ids=["autogptq", "gptqmodel"],
)
def test_packers_make_the_same_words(tmp_path: Path, environment: Path, script: str, checkpoint_format: Any) -> None:
    given, expected = {}, {}
    for bits in BITS:
        plain = Scheme(bits=bits, checkpoint_format=checkpoint_format)
        for name, scheme in (("plain", plain), ("order", replace(plain, sym=False, shuffled=True, ends=True))):
            made = rounded(np.random.default_rng(bits).normal(0, 0.1, (64, 96)), scheme)
            key = f"{name}{bits}"
            parts = {"weight": made.weight, "scales": made.scales, "zeros": made.zeros, "g_idx": made.g_idx}
            given |= {f"{key}.{part}": value for part, value in parts.items()} | {f"{key}.bits": np.array(bits)}
            arguments = (made.q, made.zeros, made.scales, made.g_idx, None, bits, checkpoint_format)
            expected |= write_module(key, *arguments)
    np.savez(tmp_path / "in.npz", **given)
    run_script(environment, script, tmp_path / "in.npz", tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    differ = [name for name in expected if not np.array_equal(found[name], expected[name])]
    assert (len(expected), differ) == (32, [])


def save_plain(folder: Path, make: Callable[[], Any]) -> Path:
    model = make().float()
    model.save_pretrained(folder)
    add_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "sym", "order", "form"),
    [(4, True, False, "gptq"), (4, False, True, "gptq"), (4, False, True, "gptq_v2"), (3, True, False, "gptq")],
)
def test_ours_reads_what_gptqmodel_writes(tmp_path: Path, bits: int, sym: bool, order: bool, form: str) -> None:
    source = save_plain(tmp_path / "model", llama)
    run_script(GPTQMODEL, "gptqmodel_quantise.py", source, tmp_path / "out", bits, 32, sym, order, form)
    run_script(GPTQMODEL, "transformers_logits.py", tmp_path / "out", tmp_path / "theirs.npy")
    ours = our_logits(tmp_path / "out", tmp_path / "plain", "float16")
    found = error(ours, np.load(tmp_path / "theirs.npy"))
    print("gptqmodel's own", bits, sym, order, form, found)
    assert found <= 1e-5
