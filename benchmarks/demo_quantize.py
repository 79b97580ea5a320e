"""The second part of the demo: a trained model is quantised, and what that costs is measured.

The model is the small LLaMA of tests/data/tiny-llama, 2.75 million parameters, with held-out text that it has not seen.
"""

from __future__ import annotations

from pathlib import Path

import torch
from demo_steps import kill_when, output_of, say, weightops
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

DATA = Path(__file__).parents[1] / "tests/data/tiny-llama"
PROMPT = "And it came to pass"
NEW_TOKENS = 24
SEQ_LEN = 256
HELD_OUT_CHARS = 34_000
"""A third of the held-out text, so that the demo is short; docs/quantize.md has all of it."""


def quantise(folder: Path) -> None:
    """Quantise, kill, resume, measure, read back; ends the demo if anything is not as it should be."""
    four, undisturbed, three, nearest = (
        folder / name for name in ("gptq-4bit", "undisturbed", "gptq-3bit", "rtn-3bit")
    )
    calibration = ["--calibration", str(DATA / "calibration.txt"), "--samples", "32", "--seq-len", str(SEQ_LEN)]
    held_out = folder / "heldout.txt"
    held_out.write_text((DATA / "heldout.txt").read_text()[:HELD_OUT_CHARS])

    say("7. Quantise a LLaMA that is really trained to 4 bits; the machine dies half-way")
    command = ["quantize", str(DATA), "--bits", "4", *calibration, "--out", str(four)]
    n_kept = _kill_half_way(four, command)

    say("8. The same command again goes on at its block, and ends with the bytes of a run that nobody disturbed")
    said, notes = output_of(*command)
    print(notes + said, end="")
    if sum(line.startswith("kept model.layers.") for line in notes.splitlines()) != n_kept:
        raise SystemExit("blocks that were done are not kept")
    weightops(*command[:-1], str(undisturbed), "--quiet")
    weightops("verify", str(four), "--manifest", str(undisturbed / "weightops-manifest.json"), "--extra", "fail")

    say("9. Three bits: by GPTQ, and by rounding every weight to the nearest")
    weightops("quantize", str(DATA), "--bits", "3", *calibration, "--out", str(three), "--quiet")
    weightops("quantize", str(DATA), "--bits", "3", "--method", "rtn", "--out", str(nearest), "--quiet")
    for path in (DATA, four, three, nearest):
        print(f"  {path.name:10}  {(path / 'model.safetensors').stat().st_size:9,} bytes")
    print("  1.0 MB of each is the embedding, which is not quantised.")

    say("10. What it costs, on text that neither the model nor GPTQ has seen")
    perplexity = _evaluate(held_out, four, three, nearest)

    say("11. Is it right?")
    weightops("check", str(four))
    _compare(folder, four, held_out, perplexity)


def _kill_half_way(out: Path, command: list[str]) -> int:
    """Kill a run without warning after half of its blocks; returns how many blocks are done."""
    blocks = out.with_name(f"{out.name}.blocks")
    kill_when((blocks / "block-00001.safetensors").exists, command)
    n_done = len(list(blocks.glob("block-*.safetensors")))
    print(f"$ kill -9: {n_done} of 4 blocks are done, {out} does not exist")
    if n_done != 2 or out.exists():
        raise SystemExit("the run was over before it could be killed: try again")
    return n_done


def _evaluate(text: Path, four: Path, three: Path, nearest: Path) -> dict[str, float]:
    """Perplexity by name; the table, and in words what it says."""
    arguments = ["eval", *map(str, (four, three, nearest)), "--reference", str(DATA), "--text", str(text)]
    said, _ = output_of(*arguments, "--seq-len", str(SEQ_LEN))
    scores, *_, convention = said.rstrip().split("\n\n")
    print(f"{scores}\n\n(and of each model the layers with the largest errors)\n\n{convention}")
    rows = [line.split() for line in scores.splitlines()[1:]]
    found = {row[0]: float(row[1]) for row in rows}
    original = found[DATA.name]
    costs = {path.name: found[path.name] / original - 1 for path in (four, three, nearest)}
    print("\nPerplexity rises " + ", ".join(f"by {100 * cost:.2f} % ({name})" for name, cost in costs.items()) + ".")
    divergence = {row[0]: float(row[4]) for row in rows if row[0] != DATA.name}
    ratio = divergence[nearest.name] / divergence[three.name]
    print(
        "Perplexity also moves by chance; KL divergence holds every prediction against the original's: by it rounding "
        f"to 3 bits is {ratio:.1f} times as far off as GPTQ."
    )
    if not divergence[four.name] < divergence[three.name] < divergence[nearest.name]:
        raise SystemExit("GPTQ is not better than rounding")
    return found


def _compare(folder: Path, quantised: Path, text: Path, perplexity: dict[str, float]) -> None:
    """Hold our reading of a quantised folder against one by hand, and our numbers against transformers' own."""
    plain = folder / "dequantized"
    weightops("dequantize", str(quantised), "--out", str(plain), "--quiet")
    ours = load_file(plain / "model.safetensors")
    by_hand = _unpacked(load_file(quantised / "model.safetensors"))
    equal = all(torch.equal(ours[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in by_hand.items())
    print(f"{len(by_hand)} layers, unpacked by hand, are the dequantised ones to the bit: {equal}")

    said, _ = output_of("generate", str(quantised), "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS))
    print(f"{PROMPT}{said}", end="")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
    same = tokenizer.decode(tokens[0, prompt.shape[1] :]) == said.removesuffix("\n")
    print(f"transformers, given the dequantised folder, says the same: {same}")

    theirs, found = (
        _perplexity(model, torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids)),
        perplexity[quantised.name],
    )
    print(f"transformers alone finds a perplexity of {theirs:.4f}, eval found {found:.4f}")
    if not (equal and same and abs(theirs / found - 1) < 1e-4):
        raise SystemExit("the quantised model is not what was measured")


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of 4-bit GPTQ v1 by the definition of the format, float16 `[N, K]`, in the plainest way there is."""
    shifts = torch.arange(0, 32, 4)
    weights = {}
    for name in tensors:
        if name.endswith(".qweight"):
            qweight, qzeros, scales, g_idx = (
                tensors[name.replace("qweight", part)] for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            q = (qweight[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, qweight.shape[1])  # [K, N]
            zeros = (qzeros[:, :, None] >> shifts & 15).reshape(len(qzeros), -1) + 1  # [G, N]
            weight = scales.float()[g_idx] * (q - zeros[g_idx])
            weights[name.replace("qweight", "weight")] = weight.T.contiguous().half()
    return weights


@torch.no_grad()
def _perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """exp of the mean negative log-likelihood, over windows that do not overlap."""
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)
    losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in windows]
    return float(torch.stack(losses).mean().exp())
