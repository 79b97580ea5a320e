"""The first part of the demo: the main job from start to verified result.

A small LLaMA is trained a few steps (raw), then a few more on another text (tuned). Then the two sides of a
release: the publisher makes a delta; the user recovers the tuned weights, is killed half-way, goes on, verifies.
"""

from __future__ import annotations

from pathlib import Path

import torch
from demo_steps import kill_when, say, weightops
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

RAW_TEXT = (Path(__file__).parent.parent / "README.md").read_bytes()
TUNED_TEXT = (Path(__file__).parent.parent / "weightops" / "errors.py").read_bytes()


def train(model: LlamaForCausalLM, text: bytes, steps: int) -> None:
    """Next-byte prediction on random windows of `text`."""
    data = torch.tensor(list(text))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(data) - 129, (4,), generator=generator)
        batch = torch.stack([data[int(s) : int(s) + 128] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, steps):
            print(f"  step {step:2}: loss {loss.item():.3f}", flush=True)
    model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Write the model in float16, as it is published, and read it back."""
    model.half().save_pretrained(folder, max_shard_size="20MB")
    model.float()
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()


def recover_killed_half_way(folder: Path, arguments: list[str]) -> None:
    """Start a recovery and kill it without warning once half of the shards are there."""
    partial = folder / "recovered.partial/output"
    kill_when(lambda: len(list(partial.glob("model-*"))) >= 8, arguments)
    there = sorted(path.name for path in partial.glob("model-*"))
    print(f"$ kill -9: {len(there)} shards are committed, {folder / 'recovered'} does not exist")
    if not there or (folder / "recovered").exists():
        raise SystemExit("the run was over before it could be killed: try again")


def recover(folder: Path) -> None:
    """Train, diff, recover, kill, resume, verify, load; ends the demo if the result is not what was trained."""
    raw, tuned, recovered = (folder / name for name in ("raw", "tuned", "recovered"))
    logging.disable_progress_bar()
    torch.manual_seed(0)

    say("1. Train a small LLaMA (raw), then train it on (tuned)")
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, intermediate_size=1376, num_attention_heads=8, vocab_size=4096
    )
    model = LlamaForCausalLM(config)
    print(f"  {model.num_parameters():,} parameters")
    train(model, RAW_TEXT, 6)
    save(model, raw)
    train(model, TUNED_TEXT, 4)
    reference = save(model, tuned)

    say("2. The publisher makes a delta: useless without raw, exact with it")
    weightops("diff", "--raw", str(raw), "--tuned", str(tuned), "--out", str(folder / "delta"))

    say("3. The user asks what recovering would take, starts it, and the machine dies half-way")
    command = ["recover", "--raw", str(raw), "--diff", str(folder / "delta"), "--out", str(recovered)]
    command += ["--max-shard-size", "4MB"]
    weightops(*command, "--dry-run")
    recover_killed_half_way(folder, command)

    say("4. The same command again continues")
    weightops(*command)
    weightops("inspect", str(recovered))

    say("5. Is it right?")
    weightops("verify", str(recovered))
    found = LlamaForCausalLM.from_pretrained(recovered, dtype=torch.float16).eval()
    prompt = torch.tensor([list(b"class WeightopsError")])
    with torch.no_grad():
        same = torch.equal(found(prompt).logits, reference(prompt).logits)
    state, expected = found.state_dict(), reference.state_dict()
    bits = all(torch.equal(state[n].view(torch.int16), t.view(torch.int16)) for n, t in expected.items())
    print(f"transformers loads it; logits equal to the tuned model's: {same}; every weight to the bit: {bits}")

    say("6. What 2023 published: tuned - raw in float16, and what that loses")
    weightops("diff", "--raw", str(raw), "--tuned", str(tuned), "--out", str(folder / "published"), "--method",
              "subtract", "--dtype", "float16", "--quiet")  # fmt: skip
    weightops("recover", "--raw", str(raw), "--diff", str(folder / "published"), "--out", str(folder / "rounded"),
              "--format", "torch-1.12", "--quiet")  # fmt: skip
    rounded = torch.load(folder / "rounded" / "pytorch_model.bin", weights_only=True)
    wrong = sum(int((rounded[n] != t).sum()) for n, t in expected.items() if n in rounded)
    print(f"{wrong / sum(t.numel() for t in expected.values()):.2%} of the weights are not what was trained")

    if not (same and bits):
        raise SystemExit("the recovered model is not the tuned one")
