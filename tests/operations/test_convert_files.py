"""What surrounds the tensors, through convert: tokenizers, templates, ends, notices and metadata, in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_model import make_meta
from safetensors.torch import load_file, safe_open, save_file
from small_tokenizers import sentencepiece_model
from tokenizer_folders import CHATML, KINDS, Files, dumped, llama3, qwen, spm, spm_chatml, spm_converted
from transformers import AutoTokenizer

from weightops import api
from weightops.errors import CorruptInput, UsageError
from weightops.formats.gguf import read_gguf
from weightops.io.source_file import SourceFile
from weightops.stores.reader import FileReader

SMALL: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 64, "parts": 1}
SMALL |= {"dtype": torch.float16, "rope_freqs": False}
CONTEXT = {"context_length": "2048"}
FOLDERS = ("meta", "tencentpretrain", "llama_inference")


def convert(source: Path, to: str, **options: Any) -> tuple[Path, tuple[str, ...]]:
    """The output, beside the source, and what was said."""
    out = source.with_name(f"{source.name}-{to}")
    settings = {} if (source / "config.json").exists() else CONTEXT
    return out, api.convert(source, out, to=to, **{"set": settings, **options}).warnings


def model(folder: Path, files: Files, rows: int) -> Path:
    """A folder as transformers saves it, with these files."""
    make_meta(folder.with_name("raw"), vocab=rows, **SMALL)
    out, _ = convert(folder.with_name("raw"), "hf")
    shutil.move(out, folder)
    shutil.rmtree(folder.with_name("raw"))
    (folder / "generation_config.json").unlink()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name == "config.json":
            ids = {key: value for key, value in json.loads(data).items() if key.endswith("token_id")}
            data = dumped({**json.loads((folder / name).read_text()), **ids})
        (folder / name).write_bytes(data)
    return folder


def keys(folder: Path) -> dict[str, Any]:
    with FileReader() as files:
        found = read_gguf(SourceFile.at(folder / "model.gguf"), files).metadata
    return {key: value for key, value in found.items() if key.startswith("tokenizer.")}


def same_files(left: Path, right: Path, names: Files) -> bool:
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names if name != "config.json")


HELD = [kind for kind in KINDS if "sentencepiece" in kind or kind == "Llama 3.1"]
"""What tokenizer.model can hold."""


@pytest.mark.parametrize("kind", HELD)
def test_files_of_a_tokenizer_go_through_metas_layout_and_back(tmp_path: Path, kind: str) -> None:
    make, _, rows = KINDS[kind]
    hf = model(tmp_path / "hf", make(), rows)
    meta, _ = convert(hf, "meta")
    assert same_files(hf, meta, make())
    back, _ = convert(meta, "hf")
    assert same_files(hf, back, make())
    stated, kept = (json.loads((folder / "config.json").read_text()) for folder in (hf, back))
    assert {key: value for key, value in stated.items() if key.endswith("token_id")}.items() <= kept.items()
    assert load_file(back / "model.safetensors").keys() == load_file(hf / "model.safetensors").keys()
    gguf = [keys(convert(folder, "gguf")[0]) for folder in (hf, back)]
    if kind == "sentencepiece as tokenizer.json":  # which then has a tokenizer.model beside it, as llama.cpp prefers
        gguf = [{key: value for key, value in each.items() if "template" in key} for each in gguf]
    if kind != "sentencepiece alone":  # which gets what it lacks
        assert gguf[0] == gguf[1]
    assert all(gguf[1][key] == value for key, value in gguf[0].items())


@pytest.mark.parametrize(
    ("kind", "to"), [*((kind, "meta") for kind in KINDS if kind not in HELD), *(("Qwen 2", to) for to in FOLDERS[1:])]
)
def test_a_tokenizer_that_tokenizer_model_cannot_hold_is_refused(tmp_path: Path, kind: str, to: str) -> None:
    make, _, rows = KINDS[kind]
    hf = model(tmp_path / "hf", make(), rows)
    with pytest.raises(UsageError, match=r"nor of sentencepiece's kind: tokenizer\.model cannot hold it") as caught:
        convert(hf, to)
    assert caught.value.hint == "--to gguf takes it; --no-tokenizer converts the weights alone"
    out, said = convert(hf, to, tokenizer=False)
    assert not (out / "tokenizer.json").exists()
    assert "there is no tokenizer in the output; --tokenizer names one" in said
    assert keys(convert(hf, "gguf")[0])["tokenizer.ggml.model"] == {"string": "gpt2"}


@pytest.mark.parametrize("to", FOLDERS)
def test_every_layout_with_a_folder_takes_what_describes_the_model(tmp_path: Path, to: str) -> None:
    beside = {"LICENSE.txt": b"l", "NOTICE": b"n", "README.md": b"# card", "additional_chat_templates/rag.jinja": b"r"}
    hf = model(tmp_path / "hf", {**spm_chatml(), **beside, "preprocessor_config.json": b"{}"}, 1502)
    out, said = convert(hf, to)
    assert same_files(hf, out, {**spm_chatml(), **beside})
    assert f"preprocessor_config.json: left out, as {to} has no place for it" in said
    assert "2 tokens that were added have no place in tokenizer.model: they are in the files beside it" in said


def test_what_a_gguf_file_has_no_place_for_stays_beside_it_or_is_named(tmp_path: Path) -> None:
    beside = {"LICENSE": b"l", "README.md": b"# card", "preprocessor_config.json": b"{}", "vocab.json": b"{}"}
    hf = model(tmp_path / "hf", {**spm_chatml(), **beside}, 1502)
    out, said = convert(hf, "gguf")
    assert {path.name for path in out.iterdir()} == {"model.gguf", "LICENSE", "README.md", "weightops-manifest.json"}
    assert said == ("preprocessor_config.json, vocab.json: left out, as gguf has no place for it",)


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_metadata_of_safetensors_is_kept_or_named(tmp_path: Path, to: str) -> None:
    hf = model(tmp_path / "hf", spm(), 1500)
    weights = load_file(hf / "model.safetensors")
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt", "torchao": "x"})
    if to == "hf":  # from a layout of other names in a safetensors file
        meta, _ = convert(hf, "meta")
        tensors = torch.load(meta / "consolidated.00.pth")
        (meta / "consolidated.00.pth").unlink()
        save_file(tensors, meta / "consolidated.safetensors", metadata={"torchao": "x"})
        out, _ = convert(meta, "hf")
        with safe_open(out / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "torchao": "x"}
        return
    out, said = convert(hf, to)
    assert [sentence for sentence in said if "torchao" in sentence and "left out" in sentence] != []


@pytest.mark.parametrize("to", ["hf", "meta", "tencentpretrain", "llama_inference", "gguf"])
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_more_tokens_than_rows_are_refused(tmp_path: Path, kind: str, to: str) -> None:
    make_meta(tmp_path / "model", vocab=1499, **SMALL)
    files = {kind: sentencepiece_model()} if kind == "tokenizer.model" else spm_converted()
    for name in files.keys() - {"config.json"}:
        (tmp_path / "model" / name).write_bytes(files[name])
    with pytest.raises(UsageError, match=r"model.*: the tokenizer has 150\d tokens, the embedding only 1499 rows"):
        convert(tmp_path / "model", to, tokenizer=None, **({"model_parallel": 1} if to == "meta" else {}))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_from_elsewhere_comes_with_what_lies_beside_it(tmp_path: Path) -> None:
    hf = model(tmp_path / "hf", spm(), 1502)
    other = tmp_path / "other"
    other.mkdir()
    for name, data in spm_chatml().items():
        (other / name).write_bytes(data)
    out, _ = convert(hf, "meta", tokenizer=other / "tokenizer.model")
    assert same_files(other, out, dict.fromkeys(("tokenizer_config.json", "added_tokens.json"), b""))
    found = keys(convert(hf, "gguf", tokenizer=other / "tokenizer.model")[0])
    assert found["tokenizer.chat_template"] == {"string": CHATML}
    assert found["tokenizer.ggml.tokens"]["array"][1][1500:] == ["<|im_end|>", "<|im_start|>"]


def test_metas_folder_is_named_as_one_that_was_converted_is(tmp_path: Path) -> None:
    """From Meta's own files GGUF gets what it gets from the Hugging Face folder that they become."""
    make_meta(tmp_path / "own", vocab=1500, **SMALL)
    (tmp_path / "own/tokenizer.model").write_bytes(sentencepiece_model())
    hf, _ = convert(tmp_path / "own", "hf")
    assert keys(convert(tmp_path / "own", "gguf")[0]) == keys(convert(hf, "gguf")[0])


def test_ends_that_config_json_alone_states_are_kept(tmp_path: Path) -> None:
    hf = model(tmp_path / "hf", spm_chatml(), 1502)
    meta, _ = convert(hf, "meta")
    assert json.loads((meta / "generation_config.json").read_text())["eos_token_id"] == 1500


def test_llama_3_in_metas_files_is_told_what_ends_a_turn_by_the_files_beside(tmp_path: Path) -> None:
    rows = KINDS["Llama 3.1"][2]
    meta, _ = convert(model(tmp_path / "hf", llama3(), rows), "meta")
    again, _ = convert(meta, "meta")
    assert (again / "tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()
    back, _ = convert(again, "hf")
    assert not (back / "tokenizer.model").exists()  # a list of ranks, which transformers would not read as one
    assert AutoTokenizer.from_pretrained(back).eos_token == "<|eot_id|>"


def test_damaged_files_beside_are_named(tmp_path: Path) -> None:
    hf = model(tmp_path / "hf", qwen(), 905)
    (hf / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CorruptInput, match=r"hf/tokenizer_config\.json: expected a JSON object"):
        convert(hf, "gguf")
