"""merge-lora beyond the tensors of the usual files: spellings, files that go along, models that run, warnings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from adapters import LINEAR, Made, State, edit_config, edit_tensors, evaluate, load_model, quietly, state
from peft import PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import weightops
from weightops.errors import CorruptInput
from weightops.formats.folder import open_checkpoint
from weightops.operations.merge_lora.operation import merge_lora

pytestmark = pytest.mark.usefixtures("one_thread")


# --- spellings ----------------------------------------------------------------------------------------------------


def spelled(state_dict: State, how: str) -> State:
    plain = {n.removeprefix("base_model.model."): t for n, t in state_dict.items()}
    match how:
        case "no prefix":
            return plain
        case "adapter's name":
            return {n.replace(".weight", ".default.weight") if "lora_" in n else n: t for n, t in state_dict.items()}
        case "compiled":
            return {f"base_model.model._orig_mod.{n}": t for n, t in plain.items()}
        case _:
            return state_dict


@pytest.mark.parametrize("how", ["no prefix", "adapter's name", "compiled", "torch file"])
def test_other_spellings_and_files_give_the_same(made: Made, tmp_path: Path, how: str) -> None:
    base, original = made.base("llama", "fp16"), made.adapter(modules_to_save=["lm_head"])
    changed = tmp_path / "adapter"
    shutil.copytree(original, changed)
    if how == "torch file":
        torch.save(state(changed), changed / "adapter_model.bin")
        (changed / "adapter_model.safetensors").unlink()
    else:
        edit_tensors(changed, lambda tensors: spelled(tensors, how))
    weightops.merge_lora(base, original, tmp_path / "expected")
    weightops.merge_lora(base, changed, tmp_path / "found")
    expected, found = state(tmp_path / "expected"), state(tmp_path / "found")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(("old", "new"), [("model.", ""), ("", "language_model."), ("model.", "model.language_model.")])
def test_bases_whose_names_begin_otherwise_are_found(made: Made, tmp_path: Path, old: str, new: str) -> None:
    base, adapter = made.base(), made.adapter(target_modules=["q_proj", "embed_tokens"])
    other = tmp_path / "other"
    other.mkdir()
    renamed = {n: n.replace(old, new, 1) if n.startswith(old) else n for n in state(base)}
    save_file({renamed[n]: t for n, t in state(base).items()}, other / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", other)
    weightops.merge_lora(base, adapter, tmp_path / "expected")
    weightops.merge_lora(other, adapter, tmp_path / "found")
    expected, found = state(tmp_path / "expected"), state(tmp_path / "found")
    assert all(torch.equal(tensor, found[renamed[name]]) for name, tensor in expected.items())


def test_tied_embeddings_that_a_file_holds_twice_stay_one(made: Made, tmp_path: Path) -> None:
    base, both = made.base("tied"), tmp_path / "both"
    adapter = made.adapter("tied", target_modules=["embed_tokens"])
    both.mkdir()
    tensors = state(base)
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, both / "pytorch_model.bin")
    shutil.copy(base / "config.json", both)
    weightops.merge_lora(base, adapter, tmp_path / "expected")
    weightops.merge_lora(both, adapter, tmp_path / "found")
    expected, found = state(tmp_path / "expected"), state(tmp_path / "found")
    assert torch.equal(found["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("wrapper", ["_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module"])
@pytest.mark.parametrize("at", [".layers.0.", ".self_attn.", "base_model."])
def test_wrappers_are_no_part_of_a_name(made: Made, tmp_path: Path, wrapper: str, at: str) -> None:
    base, original = made.base(), made.adapter()
    changed = tmp_path / "adapter"
    shutil.copytree(original, changed)
    spelling = f"{wrapper}.{at}" if at == "base_model." else f"{at}{wrapper}."
    edit_tensors(changed, lambda tensors: {n.replace(at, spelling, 1): t for n, t in tensors.items()})
    weightops.merge_lora(base, original, tmp_path / "expected")
    weightops.merge_lora(base, changed, tmp_path / "found")
    expected, found = state(tmp_path / "expected"), state(tmp_path / "found")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_of_two_prefixes_the_one_that_keeps_most_of_the_name_is_meant(made: Made, tmp_path: Path) -> None:
    """The base holds the same layers in two towers, and the adapter names one of them but for its first part."""
    adapter, other = made.adapter(target_modules=["q_proj"]), tmp_path / "other"
    other.mkdir()
    layers = {n: t for n, t in state(made.base()).items() if ".layers." in n}
    towers = {f"{tower}.{n}": t.clone() for n, t in layers.items() for tower in ("vision", "outer.text")}
    towers = {n.replace("vision.model.", "vision."): t for n, t in towers.items()}
    save_file(towers, other / "model.safetensors", metadata={"format": "pt"})
    weightops.merge_lora(other, adapter, tmp_path / "out")
    changed = {n for n, t in state(tmp_path / "out").items() if not torch.equal(t, towers[n])}
    assert changed == {f"outer.text.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


# --- what lies beside an adapter ----------------------------------------------------------------------------------


@pytest.fixture
def with_projector(made: Made, tmp_path: Path) -> tuple[Path, Path]:
    """A base with a projector, and an adapter with what was trained of it in a file beside it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(made.base(), base)
    shutil.copytree(made.adapter(), adapter)
    tensors = {**state(base), PROJECTOR: torch.zeros(8, 72)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base, adapter


PROJECTOR = "model.mm_projector.0.weight"


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "mm_projector.bin", "value_head.safetensors"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_trained_weights_beside_an_adapter_are_put_in_their_place(
    with_projector: tuple[Path, Path], tmp_path: Path, name: str, prefix: str
) -> None:
    base, adapter = with_projector
    trained = torch.randn(8, 72)
    write = torch.save if name.endswith(".bin") else save_file
    write({f"{prefix}{PROJECTOR}": trained}, adapter / name)
    weightops.merge_lora(base, adapter, tmp_path / "out")
    found, before = state(tmp_path / "out"), state(base)
    assert torch.equal(found[PROJECTOR], trained)
    assert sum(not torch.equal(tensor, before[n]) for n, tensor in found.items()) == 5


def test_two_files_that_hold_the_same_have_to_agree(with_projector: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = with_projector
    trained = torch.randn(8, 72)
    torch.save({f"base_model.model.{PROJECTOR}": trained}, adapter / "non_lora_trainables.bin")
    torch.save({PROJECTOR: trained}, adapter / "mm_projector.bin")
    weightops.merge_lora(base, adapter, tmp_path / "out")
    assert torch.equal(state(tmp_path / "out")[PROJECTOR], trained)
    torch.save({PROJECTOR: trained + 1}, adapter / "mm_projector.bin")
    with pytest.raises(CorruptInput, match=r"model\.mm_projector\.0\.weight and the same in another file: the values"):
        weightops.merge_lora(base, adapter, tmp_path / "other")


def test_a_model_beside_an_adapter_may_be_its_base(made: Made, tmp_path: Path) -> None:
    base, both = made.base(), tmp_path / "both"
    shutil.copytree(made.adapter(), both)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(base / name, both)
    weightops.merge_lora(base, made.adapter(), tmp_path / "expected")
    weightops.merge_lora(both, both, tmp_path / "found")
    expected, found = state(tmp_path / "expected"), state(tmp_path / "found")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    report = weightops.check(both)
    assert report.tensors.keys() == state(base).keys()
    assert [f for f in report.findings if f.severity == "error" or "an adapter" in f.message] == []


# --- what comes out -----------------------------------------------------------------------------------------------


def test_the_merged_model_says_what_the_adapted_one_says(made: Made, tmp_path: Path) -> None:
    base, adapter = made.base(), made.adapter(target_modules=[*LINEAR, "embed_tokens"], modules_to_save=["lm_head"])
    weightops.merge_lora(base, adapter, tmp_path / "out")
    merged, tokens = load_model(tmp_path / "out"), torch.arange(3, 15).reshape(1, -1)
    with quietly(), torch.no_grad():
        tuned = PeftModel.from_pretrained(load_model(base), adapter)
        assert torch.allclose(tuned(tokens).logits, merged(tokens).logits, atol=1e-5)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(tuned.generate(input_ids=tokens, **options), merged.generate(input_ids=tokens, **options))


def test_float64_is_near_and_rounds_once(made: Made, tmp_path: Path) -> None:
    adapters = [made.adapter(), made.adapter(seed=2)]
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 2**-6)):
        base = made.base("llama", dtype)
        weightops.merge_lora(base, adapters, tmp_path / f"a-{dtype}")
        weightops.merge_lora(base, adapters, tmp_path / f"b-{dtype}", precision="float64")
        found, near = state(tmp_path / f"a-{dtype}"), state(tmp_path / f"b-{dtype}")
        assert all(torch.allclose(near[n], t, atol=tolerance, rtol=tolerance) for n, t in found.items())
        assert any(not torch.equal(near[n], t) for n, t in found.items())


def test_order_shards_and_files_are_those_of_the_base(made: Made, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(made.base("tied"), base)
    shutil.copytree(made.adapter("tied", modules_to_save=["lm_head"]), adapter)
    for name in ("tokenizer.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja", "LICENSE"):
        (base / name).write_text("base")
    (adapter / "chat_template.jinja").write_text("adapter")
    (adapter / "special_tokens_map.json").write_text("adapter")
    opened, tuned = open_checkpoint(base), open_checkpoint(adapter)
    merged = merge_lora(opened, [tuned], evaluate=evaluate)
    assert list(merged) == [*opened, "lm_head.weight"]
    assert merged.shards["lm_head.weight"] == "model.safetensors"
    files = {n: merged.sidecar(n) for n in merged.sidecars if n not in ("config.json", "generation_config.json")}
    assert files == {
        "tokenizer.json": b"base",
        "merges.txt": b"base",
        "special_tokens_map.json": b"base",
        "chat_template.jinja": b"adapter",
        "LICENSE": b"base",
    }
    (adapter / "tokenizer.model").write_text("adapter")
    merged = merge_lora(opened, [open_checkpoint(adapter)], evaluate=evaluate)
    assert "the tokenizer is that of adapter" in merged.warnings
    files = {n: merged.sidecar(n) for n in merged.sidecars if n not in ("config.json", "generation_config.json")}
    assert files == {
        "LICENSE": b"base",
        "chat_template.jinja": b"adapter",
        "special_tokens_map.json": b"adapter",
        "tokenizer.model": b"adapter",
    }


def test_warns_where_the_result_is_not_what_was_trained(made: Made, tmp_path: Path) -> None:
    tied = weightops.merge_lora(made.base("tied"), made.adapter("tied", target_modules=["lm_head"]), tmp_path / "tied")
    assert tied.warnings == ("the embeddings are tied: what changes lm_head.weight changes both",)
    adapters = [made.adapter(target_modules=["embed_tokens"], seed=seed) for seed in (1, 2)]
    found = weightops.merge_lora(made.base(), adapters, tmp_path / "both")
    assert found.warnings == (f"model.embed_tokens.weight is that of {adapters[1].name}, the last that has it",)
    resized = made.adapter("tied", rows=110, modules_to_save=["embed_tokens", "lm_head"])
    found = weightops.merge_lora(made.base("tied"), resized, tmp_path / "resized")
    assert found.warnings == (f"{resized.name}: what modules_to_save replaces is in it too, and not used",)


def test_untrained_factors_beside_a_trained_head_are_mentioned(made: Made, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter(modules_to_save=["lm_head"]), adapter)
    edit_tensors(adapter, lambda tensors: {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})
    edit_config(adapter, lora_alpha=1)
    found = weightops.merge_lora(made.base(), adapter, tmp_path / "out")
    assert found.warnings == ("adapter: the factors change nothing: lora_B is zero everywhere",)


def test_one_trained_module_of_several_is_enough(made: Made, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter(target_modules=["q_proj"]), adapter)
    trained = "layers.0.self_attn.q_proj.lora"
    edit_tensors(adapter, lambda tensors: {n: t if trained in n else t * 0 for n, t in tensors.items()})
    found = weightops.merge_lora(made.base(), adapter, tmp_path / "out")
    assert found.warnings == ()


def test_tokens_without_a_row_are_warned_of(made: Made, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter(), adapter)
    for count, expected in ((101, []), (102, ["tokenizer.json has ids up to 101, the embedding has 101 rows"])):
        vocabulary = {f"w{i}": i for i in range(count)}
        Tokenizer(WordLevel(vocabulary, unk_token="w0")).save(str(adapter / "tokenizer.json"))
        found = weightops.merge_lora(made.base(), adapter, tmp_path / str(count))
        assert [w.partition(": the first of")[0] for w in found.warnings[1:]] == expected
        errors = [f.message for f in weightops.check(found.out).findings if f.code == "tokenizer"]
        assert errors == expected
