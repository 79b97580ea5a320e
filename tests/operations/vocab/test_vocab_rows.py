"""Rows: those that stay to the bit, new ones by each rule, in embeddings, heads and biases, tied or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, PhiConfig, PhiForCausalLM
from vocabularies import KINDS, count, document, matrices, write_model

import weightops

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", KINDS["byte BPE"]())


def rounded_mean(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.double().mean(0).to(matrix.dtype)


@pytest.mark.parametrize(("options", "rows"), [({"rows": 930}, 930), ({"multiple": 128}, 1024), ({"multiple": 1}, 911)])
def test_padding_is_the_mean_of_all_old_rows(source: Path, options: dict[str, int], rows: int) -> None:
    weightops.vocab(source, source.parent / "out", **options)
    for name in (EMBEDDING, HEAD):
        before, after = matrices(source)[name], matrices(source.parent / "out")[name]
        assert len(after) == rows == document(source.parent / "out", "config.json")["vocab_size"]
        assert torch.equal(after[:911], before)
        assert torch.equal(after[911:], rounded_mean(before).expand(rows - 911, -1))


def test_the_mean_is_what_transformers_takes_but_for_its_noise(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    deviation = model.get_input_embeddings().weight.std().item()
    model.resize_token_embeddings(930)
    weightops.cast(source, source.parent / "wide", dtype="float32")
    weightops.vocab(source.parent / "wide", source.parent / "out", rows=930)
    ours = matrices(source.parent / "out")
    for name, theirs in ((EMBEDDING, model.get_input_embeddings()), (HEAD, model.get_output_embeddings())):
        assert torch.equal(ours[name][:911], theirs.weight[:911])
        assert (ours[name] - theirs.weight).abs().max() < 3e-4 * deviation


def test_rows_are_made_by_each_rule(source: Path) -> None:
    before = matrices(source)
    made = {}
    for rule in ("zero", "copy:<|im_end|>", "pieces", "normal"):
        weightops.vocab(source, source.parent / rule, add_token="<|merging|>", rows=920, init=rule)
        made[rule] = matrices(source.parent / rule)
    pieces = Tokenizer.from_file(str(source / "tokenizer.json")).encode("<|merging|>").ids
    assert len(pieces) > 2
    for name in (EMBEDDING, HEAD):
        assert all(torch.equal(made[rule][name][:905], before[name][:905]) for rule in made)
        assert made["zero"][name][[905, *range(911, 920)]].count_nonzero() == 0
        assert torch.equal(made["copy:<|im_end|>"][name][905], before[name][901])
        assert torch.equal(made["pieces"][name][905], before[name][pieces].double().mean(0).bfloat16())
        assert torch.equal(made["pieces"][name][915], rounded_mean(before[name]))
        noise = made["normal"][name][[905, *range(911, 920)]].float()
        assert 0.6 < (noise.std() / 0.02) < 1.6


def test_normal_rows_are_those_of_the_seed(source: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        weightops.vocab(source, source.parent / name, rows=920, init="normal", seed=seed)
    one, again, other = (matrices(source.parent / name) for name in ("one", "again", "other"))
    assert torch.equal(one[HEAD], again[HEAD])
    assert not torch.equal(one[HEAD], other[HEAD])
    assert not torch.equal(one[HEAD][911:], one[EMBEDDING][911:])


def test_rows_are_cut_down_to_the_tokens_and_no_further(source: Path) -> None:
    weightops.vocab(source, source.parent / "out", rows=905)
    assert torch.equal(matrices(source.parent / "out")[HEAD], matrices(source)[HEAD][:905])


@pytest.mark.parametrize("stored", [False, True])
def test_tied_embeddings_stay_tied(tmp_path: Path, stored: bool) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"](), tied=True)
    if stored:
        tensors = load_file(source / "model.safetensors")
        save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, source / "model.safetensors", metadata={"format": "pt"})
    weightops.vocab(source, tmp_path / "out", rows=920, init="normal")
    made = matrices(tmp_path / "out")
    assert (HEAD in made) == stored
    assert torch.equal(made[EMBEDDING], made.get(HEAD, made[EMBEDDING]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def saved(model: Any, folder: Path, files: dict[str, bytes]) -> Path:
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(folder)
    for name, data in files.items():
        if name != "config.json":
            (folder / name).write_bytes(data)
    return folder


def test_a_head_with_a_bias_and_a_bias_that_is_a_row(tmp_path: Path) -> None:
    files = KINDS["Unigram"]()
    rows, ids = count(files), {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    sizes = {"num_hidden_layers": 0, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    phi = saved(PhiForCausalLM(PhiConfig(vocab_size=rows, **sizes, **ids)), tmp_path / "phi", files)
    bart_sizes = {"encoder_layers": 0, "decoder_layers": 0, "d_model": 8, "max_position_embeddings": 16}
    config = BartConfig(vocab_size=rows, **bart_sizes, **ids, decoder_start_token_id=1, forced_eos_token_id=1)
    bart = saved(BartForConditionalGeneration(config), tmp_path / "bart", files)
    for source, name, axis in ((phi, "lm_head.bias", 0), (bart, "final_logits_bias", 1)):
        weightops.vocab(source, source.with_suffix(".out"), rows=rows + 8)
        before, after = load_file(source / "model.safetensors")[name], matrices(source.with_suffix(".out"))[name]
        assert torch.equal(after.narrow(axis, 0, rows), before)
        assert after.narrow(axis, rows, 8).flatten().tolist() == [before.double().mean().float().item()] * 8
    loaded, report = BartForConditionalGeneration.from_pretrained(bart.with_suffix(".out"), output_loading_info=True)
    assert not any(report.values())
    assert loaded.final_logits_bias.shape == (1, rows + 8)


def test_embeddings_of_single_layers_have_a_count_of_their_own(tmp_path: Path) -> None:
    files = KINDS["byte BPE"]()
    source = write_model(tmp_path / "model", files, vocab_size_per_layer_input=300, model_type="unknown")
    tensors = load_file(source / "model.safetensors")
    each = torch.arange(300.0).repeat(2, 1).T.bfloat16().contiguous()
    save_file(tensors | {"model.embed_tokens_per_layer.weight": each}, source / "model.safetensors")
    (tmp_path / "corpus.txt").write_text("merging the weights\n")
    weightops.vocab(source, tmp_path / "out", trim=tmp_path / "corpus.txt")
    before, after = (
        json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (source, tmp_path / "out")
    )
    old = {number: before[text] for text, number in after.items()}
    made = matrices(tmp_path / "out")["model.embed_tokens_per_layer.weight"]
    kept = [old[i] for i in range(len(made))]
    assert kept == [number for number in sorted(old.values()) if number < 300]
    assert torch.equal(made, each[kept])
    assert document(tmp_path / "out", "config.json")["vocab_size_per_layer_input"] == len(kept)
    weightops.vocab(source, tmp_path / "padded", rows=920)
    assert torch.equal(matrices(tmp_path / "padded")["model.embed_tokens_per_layer.weight"], each)


def test_layers_for_further_tokens_have_embedding_and_head_of_their_own(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"](), model_type="unknown")
    tensors = load_file(source / "model.safetensors")
    more = {"model.layers.61.embed_tokens.weight": EMBEDDING, "model.layers.61.shared_head.head.weight": HEAD}
    save_file(tensors | {n: tensors[o].clone() for n, o in more.items()}, source / "model.safetensors")
    weightops.vocab(source, tmp_path / "out", rows=920)
    made = matrices(tmp_path / "out")
    assert all(torch.equal(made[name], made[other]) for name, other in more.items())
