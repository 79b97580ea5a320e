"""What goes along with a model and what stays: by kind, through every verb, and each file accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import write_checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import weightops
from weightops.formats.folder import open_checkpoint
from weightops.formats.sidecars import Kind, kind_of, left_behind

GOES = {
    **dict.fromkeys(("config.json", "params.json", "quantize_config.json", "hf_quant_config.json"), Kind.CONFIG),
    **dict.fromkeys(("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"), Kind.CONFIG),
    "generation_config.json": Kind.GENERATION,
    **dict.fromkeys(("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json"), Kind.TOKENIZER),
    **dict.fromkeys(("spiece.model", "vocab.txt", "qwen.tiktoken", "added_tokens.json", "source.spm"), Kind.TOKENIZER),
    **dict.fromkeys(("chat_template.jinja", "chat_template.json"), Kind.TEMPLATE),
    "additional_chat_templates/tool_use.jinja": Kind.TEMPLATE,
    **dict.fromkeys(("preprocessor_config.json", "processor_config.json"), Kind.PROCESSOR),
    "video_preprocessor_config.json": Kind.PROCESSOR,
    **dict.fromkeys(("LICENSE", "LICENSE.txt", "license.md", "NOTICE", "Notice.txt", "COPYING.LESSER"), Kind.NOTICE),
    **dict.fromkeys(("USE_POLICY.md", "ACCEPTABLE_USE_POLICY", "use_policy.txt"), Kind.NOTICE),
    "README.md": Kind.CARD,
}
STAYS = (
    *("train.jsonl", "data.parquet", "notes.txt", "run.log", "id_rsa", "secrets.env", "trainer_state.json", "x.pem"),
    *(
        "all_results.json",
        "events.out.tfevents.1",
        "optimizer.pt",
        "training_args.bin",
        "model.onnx",
        "flax_model.msgpack",
    ),
    *("train.py", "tokenizer_corpus.txt", "image.png", "README_zh.md", "runs/config.json", "policy.npz"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "model", {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(3)})
    for name in (*GOES, *STAYS):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_what_describes_the_model_goes_along_and_the_rest_is_named_with_its_size(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b"x" * 1_234_567)
    result = weightops.shard(folder, folder.parent / "out")
    found = {str(p.relative_to(result.out)) for p in result.out.rglob("*") if p.is_file()}
    assert found == {*GOES, "model.safetensors", "weightops-manifest.json"}
    assert {name: kind_of(name) for name in GOES} == GOES
    (said,) = [w for w in result.warnings if "not carried along" in w]
    assert "all_results.json (2 bytes), data.parquet (2 bytes)" in said
    assert "more" in said
    for name in sorted(STAYS)[:10]:
        (folder / name).unlink()
    (said,) = left_behind(open_checkpoint(folder))
    assert "train.jsonl (1.2 MB)" in said
    assert "runs/" in said
    assert weightops.verify(result.out).verdict


def test_files_in_subfolders_are_in_the_manifest(folder: Path) -> None:
    out = weightops.shard(folder, folder.parent / "out").out
    (out / "additional_chat_templates/tool_use.jinja").write_text("changed")
    assert not weightops.verify(out).verdict


def test_named_templates_survive_with_their_tokenizer(tmp_path: Path) -> None:
    """Transformers saves templates other than `default` in a folder of their own."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(__file__).parents[1] / "data/tiny-llama")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    folder = write_checkpoint(tmp_path / "model", {"a": torch.ones(2)})
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates/tool_use.jinja").is_file()
    out = weightops.shard(folder, tmp_path / "out").out
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("auto_map", "goes"),
    [
        ({"AutoModel": "modeling_x.X"}, {"modeling_x.py", "layers.py", "kernels.py"}),
        ({"AutoConfig": "configuration_x.C"}, {"configuration_x.py"}),
        ({"AutoTokenizer": ["tokenization_x.T", None]}, {"tokenization_x.py"}),
        ({"AutoModel": "org/other--modeling_x.X"}, set()),
        ({"AutoModel": "../modeling_x.X"}, set()),
        ({"AutoModel": 7}, set()),
        (["modeling_x.X"], set()),
        (None, set()),
    ],
)
@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_goes_along_as_far_as_a_config_names_it(
    tmp_path: Path, auto_map: object, goes: set[str], config: str
) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.ones(2)})
    (folder / config).write_text(json.dumps({"auto_map": auto_map}))
    for name in ("modeling_x", "configuration_x", "tokenization_x", "kernels", "layers", "train", "os"):
        (folder / f"{name}.py").write_text("raise SystemExit\n")
    (folder / "modeling_x.py").write_text(
        "import os\nfrom .layers import A\nfrom torch import nn\n    from .gone import B\n"
    )
    (folder / "layers.py").write_text("import .kernels\nfrom .modeling_x import X\n")
    found = open_checkpoint(folder)
    assert {name for name in found.sidecars if name.endswith(".py")} == goes
    assert all(any(name in warning for warning in found.warnings) for name in goes)
    assert {"train.py", "os.py"} <= found.left.keys()


def test_a_file_too_large_to_describe_anything_stays(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.ones(2)})
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(100_000_001)
    found = open_checkpoint(folder)
    assert "tokenizer.json" not in found.sidecars
    assert found.left == {"tokenizer.json": 100_000_001}
    assert "tokenizer.json (100.0 MB)" in left_behind(found)[0]


TORCHAO = {"format": "pt", "tensor_names": '["a.weight"]', "a.weight": '{"_type": "Int8Tensor"}', "ключ": "значение"}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("metadata", [TORCHAO, {"format": "mlx"}, {"format": "pt"}, {}, None], ids=str)
def test_metadata_is_kept_in_every_shard(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    (tmp_path / "model").mkdir()
    tensors = {name: torch.ones(10, 10) for name in "ab"}
    save_file(tensors, tmp_path / "model/model.safetensors", metadata=metadata)
    for source in ("model", "model/model.safetensors"):
        out = weightops.shard(tmp_path / source, tmp_path / "out", max_shard_size="500", overwrite=True).out
        files = sorted(out.glob("*.safetensors"))
        assert [metadata_of(file) for file in files] == [{"format": "pt"} | (metadata or {})] * 2
    back = weightops.shard(tmp_path / "out", tmp_path / "back").out
    assert metadata_of(back / "model.safetensors") == {"format": "pt"} | (metadata or {})


def test_metadata_without_a_place_and_metadata_that_disagrees_are_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.ones(3)}, tmp_path / "model" / name, metadata={"same": "1", "rank": str(i)})
    result = weightops.shard(tmp_path / "model", tmp_path / "out", format="torch")
    assert "the files' __metadata__ disagrees on rank: left out" in result.warnings
    assert "torch files have no place for the __metadata__ of the source: same left out" in result.warnings
    kept = weightops.shard(tmp_path / "model", tmp_path / "kept").out / "model.safetensors"
    assert metadata_of(kept) == {"format": "pt", "same": "1"}
