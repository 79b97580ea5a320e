"""kill -9 at every change to the disk of a whole run, then the same command: the same bytes as undisturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import THEN
from meta_model import make_meta
from safetensors.torch import save_file
from support import write_checkpoint
from systems import needs_itself
from tiny_models import save_tiny, text
from vocabularies import KINDS, write_model

import weightops

pytestmark = needs_itself("fork")

RECIPE = """\
sources: {raw: ./raw, delta: ./delta, adapter: ./adapter}
tensors:
  tuned: {recover: {raw: raw, diff: delta}}
  chat: {merge-lora: {base: tuned, adapter: adapter}}
  named: {shard: {source: chat, add_prefix: model.}}
outputs:
  one: {from: chat, format: torch-1.12, dtype: bfloat16}
  two: {from: named, max_shard_size: 9KB}
"""


STEPS = """\
edit:
  source: raw
  steps:
    - {select: '(?P<x>[ab])\\.weight', concat: {by: x, order: [b, a]}, name: ab.weight}
    - {select: 'c\\.weight', combine: {weight: 0.5, with: [{from: tuned, weight: 0.5}]}}
    - {select: 'd\\.weight', transpose: true}
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    raw = {f"{name}.weight": torch.randn(40, 50).half() for name in "abcd"}
    small = {"num_hidden_layers": 1}  # of 32 layers each run would build a skeleton, to learn their names
    write_checkpoint(folder / "raw", raw, small, shards=2)
    write_checkpoint(folder / "tuned", {n: t + 0.5 for n, t in raw.items()} | {"e": torch.ones(3)}, small, shards=2)
    weightops.diff(folder / "raw", folder / "tuned", folder / "delta")
    weightops.diff(folder / "raw", folder / "tuned", folder / "small", compress=True)
    write_checkpoint(folder / "published", {n: torch.randn(40, 50) for n in raw})
    codes = {f"{name}.weight": torch.randn(40, 50).to(torch.float8_e4m3fn) for name in "abcdef"}
    scales = {f"{name}.weight_scale_inv": torch.rand(3, 2) for name in "abcdef"}
    about = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    write_checkpoint(folder / "blocks", {**scales, **codes}, {**small, "quantization_config": about}, shards=3)
    factors = {"lora_A": (2, 50), "lora_B": (40, 2)}
    adapter = {f"base_model.model.{m}.{f}.weight": torch.randn(size) for m in "ac" for f, size in factors.items()}
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a", "c"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    write_model(folder / "words", KINDS["byte BPE"]())
    write_model(folder / "others", KINDS["WordPiece"]())
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "vocab": 48}
    make_meta(folder / "meta", **sizes, parts=2, dtype=torch.float32)
    (folder / "steps.yml").write_text(STEPS)
    return folder


COMMANDS = [
    "diff --raw raw --tuned tuned",
    "diff --raw raw --tuned tuned --compress",
    "recover --raw raw --diff delta",
    "recover --raw raw --diff small",
    "recover --raw raw --diff published --format torch-1.12",
    "convert meta --to hf --set context_length=8 --dtype float16",
    "convert meta --model-parallel 4 --to=meta",
    "merge raw published --base raw --method dare_linear --weight 1 --density 0.5 --dtype float32",
    "dequantize blocks --dtype float16",
    "edit steps.yml --no-architecture",
    "vocab words --multiple 64 --init normal",
    "vocab words --tokenizer others --method omp --k 3",
]
"""All of them write by the same code, which one killed at each third change has proven: here each twentieth will do.
The slow tests kill each at every change."""


@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("recover --raw raw --diff delta --overwrite", 3),
        *((command, 20) for command in COMMANDS),
        *(
            pytest.param(command, 1, marks=pytest.mark.slow)
            for command in ("recover --raw raw --diff delta --overwrite", *COMMANDS)
        ),
    ],
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(family: Path, command: str, step: int) -> None:
    folders = ("raw", "tuned", "delta", "small", "published", "meta", "blocks", "steps.yml", "words", "others")
    name, *words = command.split()
    arguments = [name, *(str(family / word) if word in folders else word for word in words)]
    out = family / "out"
    size = () if "--to=meta" in arguments else ("--max-shard-size", "9KB")
    kill_everywhere([out], step, [*arguments, "--out", str(out), *size])


@pytest.mark.parametrize(
    ("options", "step"),
    [((), 45), *(pytest.param(options, 1, marks=pytest.mark.slow) for options in ((), ("--overwrite",)))],
)
def test_a_recipe_killed_anywhere_ends_with_the_same_bytes_in_all_outputs(
    family: Path, options: tuple[str, ...], step: int
) -> None:
    (family / "recipe.yaml").write_text(RECIPE)
    kill_everywhere([family / name for name in ("one", "two")], step, ["run", str(family / "recipe.yaml"), *options])


@pytest.mark.parametrize("step", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_merge_killed_anywhere_draws_the_same_masks_again(family: Path, step: int) -> None:
    options = ["--method", "dare_ties", "--base", str(family / "raw"), "--weight", "0.5", "--density", "0.4"]
    files = ["--dtype", "float32", "--max-shard-size", "9KB", "--out", str(family / "out")]
    kill_everywhere([family / "out"], step, ["merge", str(family / "published"), *options, *files])


@pytest.mark.parametrize("step", [150, pytest.param(1, marks=pytest.mark.slow)])
def test_a_model_that_is_quantised_ends_with_the_same_bytes_too(tmp_path: Path, step: int) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(text(300))
    arguments = ["quantize", str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt"), "--act-order"]
    sizes = ["--group-size", "32", "--samples", "40", "--seq-len", "64"]
    kill_everywhere([tmp_path / "out"], step, [*arguments, *sizes, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "step"),
    [((), 60), *(pytest.param(options, 1, marks=pytest.mark.slow) for options in ((), ("--overwrite",)))],
)
def test_a_job_killed_anywhere_is_written_done_and_finished_by_the_same_commands(
    family: Path, options: tuple[str, ...], step: int
) -> None:
    (family / "recipe.yaml").write_text(RECIPE.replace("format: torch-1.12", "max_shard_size: 5KB"))
    job = str(family / "one.job")
    commands = [["run", str(family / "recipe.yaml"), "--job", job, *options]]
    commands += [["work", job, "--group", str(number)] for number in range(2)]
    words = [word for command in [*commands, ["finish", job]] for word in (THEN, *command)][1:]
    kill_everywhere([family / name for name in ("one", "two")], step, words)


@pytest.mark.parametrize("step", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_a_driver_killed_anywhere_is_started_again_and_ends_with_the_same_bytes(family: Path, step: int) -> None:
    (family / "recipe.yaml").write_text(RECIPE.replace("format: torch-1.12", "max_shard_size: 5KB"))
    words = ["run", str(family / "recipe.yaml"), "--job", str(family / "one.job"), "--executor", "threads"]
    kill_everywhere([family / name for name in ("one", "two")], step, words)


def kill_everywhere(outs: list[Path], step: int, arguments: list[str]) -> None:
    """Kill a command at each of its changes to the disk in turn, or each `step`-th, and run it again."""
    killer = Path(__file__).with_name("killer.py")
    done = subprocess.run(
        [sys.executable, str(killer), str(step), ",".join(map(str, outs)), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a child does not have the threads that its parent had
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] > 30
    assert found["wrong"] == []
