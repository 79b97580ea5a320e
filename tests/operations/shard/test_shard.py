"""Names, prefixes and tied embeddings, held against transformers' models and safetensors' own writer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import given_tensor, random_tensor, write_checkpoint

import weightops
from weightops.checkpoint import Checkpoint, written_json
from weightops.cli.main import cli
from weightops.errors import IncompatibleInputs, UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.operations.diff import diff
from weightops.operations.shard.operation import shard
from weightops.ops.stored import Stored
from weightops.spec import DType

State = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = [EMBEDDING, "model.layers.0.mlp.up_proj.weight", "model.layers.0.rotary_emb.inv_freq", HEAD]


def model(names: list[str], config: dict[str, Any] | None = None, shape: tuple[int, ...] = (2, 3)) -> Checkpoint:
    """A checkpoint of tensors that are all different, but for equal names' sake."""
    tensors = {name: given_tensor(torch.full(shape, float(i))) for i, name in enumerate(names)}
    sidecars = {"config.json": written_json(config)} if config else {}
    return Checkpoint("model", tensors, sidecars, shards={name: f"{name}.bin" for name in names})


# --- names --------------------------------------------------------------------------------------------------------


def test_the_renamed_file_is_the_one_that_safetensors_would_write(tmp_path: Path) -> None:
    state = {
        f"transformer.h.{n}.{kind}": random_tensor(dtype, (5, n + 1), n)
        for n in range(3)
        for kind, dtype in (("attn", DType.BF16), ("mlp", DType.F32), ("mask", DType.BOOL))
    }
    write_checkpoint(tmp_path / "raw", state)
    weightops.shard(tmp_path / "raw", tmp_path / "out", rename={r"^transformer\.h\.(\d+)": r"model.layers.\1"})
    expected = {name.replace("transformer.h", "model.layers"): tensor for name, tensor in state.items()}
    save_file(expected, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_tensors_stay_ranges_of_the_files_that_they_were_in(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: torch.zeros(2, 3) for name in NAMES}, shards=2)
    source = open_checkpoint(tmp_path)
    result = shard(source, drop=["*.inv_freq"], rename={"up": "down"}, drop_prefix="model.", add_prefix="x.")
    assert list(result) == ["x.embed_tokens.weight", "x.lm_head.weight", "x.layers.0.mlp.down_proj.weight"]
    assert result["x.layers.0.mlp.down_proj.weight"] == source["model.layers.0.mlp.up_proj.weight"]
    assert all(isinstance(tensor.op, Stored) for tensor in result.values())
    assert result.shards["x.lm_head.weight"] == source.shards[HEAD]


@settings(deadline=None)
@given(st.lists(st.text("ab.", min_size=1), min_size=1, unique=True), st.text("ab.\\[(", min_size=1))
def test_a_prefix_that_is_put_on_comes_off_again(names: list[str], prefix: str) -> None:
    source = model(names)
    there = shard(source, add_prefix=prefix)
    assert list(there) == [f"{prefix}{name}" for name in names]
    back = shard(there, drop_prefix=prefix)
    assert (dict(back), back.shards, back.warnings) == (dict(source), source.shards, ())


@settings(deadline=None)
@given(
    st.lists(st.text("ab.1", min_size=1), min_size=1, unique=True),
    st.lists(st.tuples(st.sampled_from(["a", "^b", r"(\.)(\d)", "[ab]+$"]), st.sampled_from(["", "c", r"\g<0>x"]))),
)
def test_names_are_those_of_re_sub_or_the_whole_edit_is_refused(
    names: list[str], renames: list[tuple[str, str]]
) -> None:
    source, expected, matched = model(names), list(names), True
    for pattern, text in dict(renames).items():
        matched = matched and any(re.search(pattern, name) for name in expected)
        expected = [re.sub(pattern, text, name) for name in expected]
        if not matched or len(set(expected)) < len(expected) or "" in expected:
            with pytest.raises(UsageError, match=r"no tensor's name holds|which no tensor can be|would both be named"):
                shard(source, rename=dict(renames))
            return
    result = shard(source, rename=dict(renames))
    assert [(new, result[new]) for new in result] == list(zip(expected, source.values(), strict=True))


def test_edits_are_made_one_after_the_other() -> None:
    result = shard(
        model([*NAMES, "extra.weight"], {"num_hidden_layers": 1, "model_type": "llama"}),
        drop=["*.inv_freq", "extra.*"],
        drop_prefix="model.",
        rename={"^layers": "blocks", "^blocks": "h"},
        add_prefix="net.",
        layers="0,0",
    )
    assert list(result) == [
        "net.embed_tokens.weight",
        "net.h.0.mlp.up_proj.weight",
        "net.h.1.mlp.up_proj.weight",
        "net.lm_head.weight",
    ]
    assert result.dropped.keys() == {"model.layers.0.rotary_emb.inv_freq", "extra.weight"}
    assert result.warnings == (
        "left out: extra.weight, model.layers.0.rotary_emb.inv_freq",
        "not under model., and named as before: lm_head.weight",
    )


def test_lists_of_exceptions_name_modules_anew_and_what_cannot_is_pointed_out() -> None:
    config = {"quantization_config": {"ignore": ["lm_head"]}}
    found = shard(model(NAMES, config), rename={"^lm_head": "head"})
    assert found.config()["quantization_config"] == {"ignore": ["head"]}
    assert found.warnings == ()
    config = {"quantization_config": {"ignore": ["model"]}}
    (note,) = shard(model(NAMES, config), rename={r"^model\.layers": "deep"}).warnings
    assert note == "config.json: quantization_config names modules as they were named before"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rename": {"^x": "y"}}, r"no tensor's name holds '\^x'"),
        ({"rename": {"(": "y"}}, r"cannot rename '\(' to 'y': missing \)"),
        ({"rename": {"up": r"\1"}}, r"cannot rename 'up' to '\\1': invalid group reference 1"),
        ({"rename": {".*weight$": "w"}}, "model.embed_tokens.weight and .* would both be named w"),
        ({"rename": {"^lm_head.weight$": ""}}, "lm_head.weight would be named '', which no tensor can be"),
        ({"rename": {"^lm_head.weight$": "__metadata__"}}, "would be named '__metadata__'"),
        ({"rename": {"^lm_head": "\udcff"}}, "which no tensor can be"),
        ({"drop_prefix": "module."}, r"no tensor's name begins with 'module\.'"),
        ({"drop_prefix": HEAD}, "would be named '', which no tensor can be"),
        ({"drop": ["*.bias"]}, r"no tensor is named like \*\.bias"),
        ({"drop": ["*"]}, "all 4 tensors would be left out"),
        ({"tie": True, "untie": True}, "tied or untied, not both"),
        ({"tie": True}, "has no config.json, which says whether embeddings are tied"),
        ({"untie": True}, "has no config.json"),
    ],
)
def test_edits_that_cannot_be_meant_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        shard(model(NAMES), **options)


def test_two_names_that_become_one_are_refused_whichever_edit_makes_them() -> None:
    with pytest.raises(UsageError, match=r"^m\.a and a would both be named a$"):
        shard(model(["m.a", "a"]), drop_prefix="m.")


def test_deltas_are_repacked_and_not_edited(tmp_path: Path) -> None:
    for seed, side in enumerate(("raw", "tuned")):
        write_checkpoint(tmp_path / side, {"a.weight": random_tensor(DType.F32, (4,), seed)})
    raw, tuned = (open_checkpoint(tmp_path / side) for side in ("raw", "tuned"))
    with pytest.raises(IncompatibleInputs, match="is a delta, not a model"):
        shard(diff(raw, tuned, method="exact"), add_prefix="x.")
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta")
    with pytest.raises(IncompatibleInputs, match="is a delta, not a model"):
        shard(open_checkpoint(tmp_path / "delta"), add_prefix="x.")
    weightops.shard(tmp_path / "delta", tmp_path / "again")
    weightops.recover(tmp_path / "raw", tmp_path / "again", tmp_path / "recovered")
    assert torch.equal(*(load_file(tmp_path / f / "model.safetensors")["a.weight"] for f in ("tuned", "recovered")))


def test_parts_of_tensors_are_refused() -> None:
    source = Checkpoint("meta", {}, shards={"a": "consolidated.00.pth", "b": "consolidated.01.pth"})
    with pytest.raises(UsageError, match="each file holds a part of every tensor"):
        shard(source)


# --- tied embeddings ----------------------------------------------------------------------------------------------

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def _llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied))


def _gpt2(tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied))


def _gpt_neox(tied: bool) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, tie_word_embeddings=tied))


def _opt(tied: bool) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    size = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(**size, word_embed_proj_dim=16, tie_word_embeddings=tied))


def _llava(tied: bool) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**{**TINY, "image_size": 8, "patch_size": 4})
    parts = {"vision_config": vision, "text_config": LlamaConfig(**TINY, tie_word_embeddings=tied)}
    return LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_id=39, tie_word_embeddings=tied))


ARCHITECTURES = pytest.mark.parametrize("make", [_llama, _gpt2, _gpt_neox, _opt, _llava])


def _saved(make: Callable[[bool], Any], tied: bool, folder: Path) -> Any:
    torch.manual_seed(0)
    built = make(tied).eval()
    with torch.no_grad():
        built.get_output_embeddings().weight.copy_(built.get_input_embeddings().weight)
    built.save_pretrained(folder)
    return built


def _loaded(kind: type, folder: Path) -> Any:
    found, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return found.eval()


def _same_logits(left: Any, right: Any) -> bool:
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        return torch.equal(left(tokens).logits, right(tokens).logits)


@ARCHITECTURES
def test_a_model_that_is_tied_computes_what_it_did(tmp_path: Path, make: Callable[[bool], Any]) -> None:
    before = _saved(make, False, tmp_path / "raw")
    weightops.shard(tmp_path / "raw", tmp_path / "out", tie=True)
    raw, out = (load_file(tmp_path / side / "model.safetensors") for side in ("raw", "out"))
    (head,) = raw.keys() - out.keys()
    assert raw[head].shape == (40, 16)
    after = _loaded(type(before), tmp_path / "out")
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
    assert _same_logits(before, after)


@ARCHITECTURES
@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_a_model_that_is_untied_computes_what_it_did(
    tmp_path: Path, make: Callable[[bool], Any], container: str
) -> None:
    before = _saved(make, True, tmp_path / "raw")
    weightops.shard(tmp_path / "raw", tmp_path / "out", untie=True, format=container)
    after = _loaded(type(before), tmp_path / "out")
    embedding, head = after.get_input_embeddings().weight, after.get_output_embeddings().weight
    assert torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()
    assert _same_logits(before, after)


def test_embeddings_that_differ_in_one_bit_are_not_tied_and_nothing_is_published(tmp_path: Path) -> None:
    state = {EMBEDDING: torch.zeros(64, 64), HEAD: torch.zeros(64, 64)}
    state[HEAD][63, 63] = -0.0
    write_checkpoint(tmp_path / "raw", state)
    with pytest.raises(WeightopsError, match=r"raw: lm_head.weight cannot be tied to model.embed_tokens.weight"):
        weightops.shard(tmp_path / "raw", tmp_path / "out", tie=True)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_embeddings_that_share_their_bytes_are_not_compared(tmp_path: Path) -> None:
    weight = torch.rand(4, 4)
    (tmp_path / "raw").mkdir()
    torch.save({EMBEDDING: weight, HEAD: weight}, tmp_path / "raw/pytorch_model.bin")
    (tmp_path / "raw/config.json").write_text('{"tie_word_embeddings": true}')
    result = shard(open_checkpoint(tmp_path / "raw"), tie=True)
    assert (list(result), result.watch) == ([EMBEDDING], ())
    assert result.dropped == {HEAD: f"tied to {EMBEDDING}, which holds the same"}


def test_configs_of_more_than_text_say_so_in_both_places() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    tied = shard(model([f"language_model.{EMBEDDING}"], config), untie=True)
    assert tied.config() == {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }
    assert list(tied) == [f"language_model.{EMBEDDING}", f"language_model.{HEAD}"]
    assert tied.shards[f"language_model.{HEAD}"] == f"language_model.{EMBEDDING}.bin"


@pytest.mark.parametrize(
    ("names", "options", "problem"),
    [
        ([EMBEDDING], {"tie": True}, "there is no output embedding beside an input embedding"),
        (["embed.weight", HEAD], {"tie": True}, "there is no output embedding beside an input embedding"),
        ([f"a.{EMBEDDING}", f"a.{HEAD}", f"b.{EMBEDDING}", f"b.{HEAD}"], {"tie": True}, "cannot tell which embeddings"),
        (["model.layers.3.embed_tokens.weight"], {"untie": True}, "there is no input embedding that is known"),
        ([EMBEDDING, HEAD], {"untie": True}, "has an output embedding already, lm_head.weight"),
    ],
)
def test_models_whose_embeddings_cannot_be_told_are_refused(
    names: list[str], options: dict[str, bool], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        shard(model(names, {"model_type": "llama"}), **options)


def test_embeddings_of_two_shapes_are_refused_before_anything_is_read() -> None:
    source = model([EMBEDDING], {"model_type": "llama"})
    head = model([HEAD], shape=(3, 3))
    with pytest.raises(IncompatibleInputs, match=r"is float32 \[2, 3\], lm_head.weight is float32 \[3, 3\]"):
        shard(Checkpoint("model", {**source, **head}, source.sidecars), tie=True)


def test_encoder_decoders_are_not_tied_or_untied() -> None:
    with pytest.raises(UsageError, match="encoder-decoders tie more than two embeddings"):
        shard(model([EMBEDDING, HEAD], {"is_encoder_decoder": True}), tie=True)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_hands_its_options_on(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "raw", {f"m.{name}": torch.zeros(2, 3) for name in NAMES}, {"num_hidden_layers": 1})
    words = "--drop *.inv_freq --drop-prefix m. --rename up_(proj) down_\\1 --rename down_ d_ --layers 0,0 --tie -q"
    arguments = [str(tmp_path / "raw"), "--out", str(tmp_path / "out"), *words.split(" ")]
    assert CliRunner().invoke(cli, ["shard", *arguments], catch_exceptions=False).exit_code == 0
    layers = [f"model.layers.{n}.mlp.d_proj.weight" for n in range(2)]
    assert load_file(tmp_path / "out/model.safetensors").keys() == {EMBEDDING, *layers}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_hidden_layers"], config["tie_word_embeddings"]) == (2, True)


def test_a_pattern_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--out", str(tmp_path / "out"), "--rename", "a", "b", "--rename", "a", "c"]
    result = CliRunner().invoke(cli, ["shard", *arguments])
    assert result.exit_code == 2
    assert "one pattern is given to --rename twice" in result.output
