"""Two checkpoints side by side are paired and measured as `compare` does it, whatever form each is in."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub
from meta_model import make_meta
from safetensors.torch import load_file, save_file
from small_tokenizers import sentencepiece_model
from support import write_checkpoint
from tiny_models import quantize_tiny, save_tiny

pytest.importorskip("textual")

from test_browse import browse, lines, panel, search, until
from textual.pilot import Pilot

import weightops
from weightops.cli.browse.app import Browser
from weightops.cli.browse.rows import Row
from weightops.cli.browse.subject import Subject, open_side
from weightops.engine.control import Control
from weightops.errors import Interrupted
from weightops.formats.folder import open_checkpoint
from weightops.operations.compare import Alignment, Pair, TensorChange
from weightops.stores.web.web import Web

UP, EMBEDDING = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in float16."""
    folder = tmp_path_factory.mktemp("pairs") / "base"
    save_tiny(folder, "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def edited(base: Path, tmp_path: Path) -> Callable[[Callable[[State], State]], Path]:
    """A copy of the base with what an edit makes of its tensors."""

    def make(edit: Callable[[State], State]) -> Path:
        shutil.copytree(base, tmp_path / "edited")
        path = tmp_path / "edited" / "model.safetensors"
        save_file({n: t.contiguous() for n, t in edit(load_file(path)).items()}, path, {"format": "pt"})
        return tmp_path / "edited"

    return make


def shown(a: Path, b: Path, name: str) -> tuple[str, list[str]]:
    """What the panel says of a tensor once it was read, and the lines of the tree."""
    found: list[str] = []

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await search(browser, pilot, name)
        await until(pilot, lambda: "elements by magnitude" in panel(browser))
        found.extend([panel(browser), *lines(browser)])

    browse([a, b], steps)
    return found[0], found[1:]


def rows(a: Path, b: Path) -> dict[str, Row]:
    control = Control()
    return dict(Subject.of(open_side(a, control), open_side(b, control), control=control).rows)


def test_layouts_are_seen_through(tmp_path: Path) -> None:
    """q lies in another order of rows in Meta's files, and one head of it was changed."""
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "vocab": 1500}
    make_meta(tmp_path / "meta", **sizes, parts=2, dtype=torch.float16, tokenizer=sentencepiece_model(), seed=3)
    weightops.convert(tmp_path / "meta", tmp_path / "hf", to="hf", set={"context_length": "128"})
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    state[Q][16:32] *= 2
    save_file(state, path, {"format": "pt"})
    text, tree = shown(tmp_path / "hf", tmp_path / "meta", "attention.wq")  # by what only the second calls it
    assert text.startswith(Q)
    assert "named layers.0.attention.wq.weight" in text
    assert "heads: a few attention heads changed" in text
    assert "changed heads: 1 of 4" in text
    assert "sign flips: 0" in text
    assert text.count("xxh3_128") == 1  # no file has the bytes of Meta's parts joined
    assert not [line for line in tree if line[0] in "-+≠" or line.endswith("*")]
    found = rows(tmp_path / "hf", tmp_path / "meta")
    assert all(
        row.members[0] is not None and row.members[1] is not None for row in found.values() if not row.is_derived
    )


def test_prefixes_are_seen_through_and_what_is_alone_is_marked(
    base: Path, edited: Callable[[Callable[[State], State]], Path]
) -> None:
    def edit(state: State) -> State:
        del state["model.norm.weight"]
        state[UP][3, 5] = torch.nan
        named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        return named | {"score.weight": torch.ones(2, 128).half()}

    other = edited(edit)
    text, tree = shown(base, other, UP)
    assert "named layers.0.mlp.up_proj.weight" in text
    assert "not-finite: " in text
    assert "NaN 0 in A, 1 in B; infinite 0 in A, 0 in B; the first of B alone at [3, 5]" in text
    assert "+ score.weight  F16 [2, 128]" in tree
    assert "- norm.weight  F16 [128]" in tree
    assert {name: row.mark for name, row in rows(base, other).items() if row.mark} == {
        "model.norm.weight": "-",
        "score.weight": "+",
    }
    assert "B  no partner: nothing here is this tensor" in shown(base, other, "model.norm.weight")[0]


def test_a_cast_is_said_to_be_one(base: Path, tmp_path: Path) -> None:
    weightops.cast(base, tmp_path / "cast", dtype="bfloat16")
    text, tree = shown(base, tmp_path / "cast", UP)
    assert "cast: B is A, rounded to B's number type" in text
    one, two = (load_file(folder / "model.safetensors")[UP].double() for folder in (base, tmp_path / "cast"))
    change = (two - one).abs()
    row, column = divmod(int(change.argmax()), change.shape[1])
    at = f"{float(change.max()):.4g} at [{row}, {column}]: {float(one[row, column]):.6g} in A"
    assert f"greatest difference: {at}, {float(two[row, column]):.6g} in B" in text
    assert f"||B - A|| / ||A||: {float(change.norm() / one.norm()):.3g}" in text
    assert f"changed: {int((change > 0).sum()):,} of {one.numel():,}" in text
    assert any(line.startswith("≠ up_proj.weight") for line in tree)


def test_packed_weights_are_shown_beside_what_they_stand_for(base: Path, tmp_path: Path) -> None:
    quantize_tiny(base, tmp_path / "gptq")
    text, tree = shown(base, tmp_path / "gptq", "0.mlp.up_proj.qweight")
    assert text.startswith(UP)
    assert "B  gptq, 4 bits, groups of 32, as float16 [256, 128]" in text
    assert "quantised: one is the other, to within a quantisation step" in text
    assert "quantisation steps apart: 0." in text
    packed = load_file(tmp_path / "gptq" / "model.safetensors")
    nbytes = sum(tensor.nbytes for name, tensor in packed.items() if name.startswith(UP.removesuffix("weight")))
    assert f"33 k elements, {nbytes / 1000:.1f} kB" in text.replace("32.8 k", "33 k")
    assert not [line for line in tree if "qweight" in line]
    assert {row.mark for row in rows(base, tmp_path / "gptq").values()} == {"", "≠"}


def test_added_rows_are_counted_and_changed_ones_named(
    base: Path, edited: Callable[[Callable[[State], State]], Path]
) -> None:
    def edit(state: State) -> State:
        grown = torch.cat([state[EMBEDDING], torch.ones(2, 128).half()])
        grown[7] *= -1
        return {**state, EMBEDDING: grown}

    text, _ = shown(base, edited(edit), EMBEDDING)
    assert "more rows in B: 2, which are not compared" in text
    assert "rows: a few rows changed, the others are equal" in text
    count = load_file(base / "model.safetensors")[EMBEDDING].shape[0]
    assert f"changed rows: 1 of {count}: 7 “" in text
    assert "sign flips: 128" in text


def test_shapes_that_cannot_be_compared_are_a_sentence(
    base: Path, edited: Callable[[Callable[[State], State]], Path]
) -> None:
    other = edited(lambda state: {**state, UP: state[UP].T})
    assert "float16 [256, 128] in A, float16 [128, 256] in B" in shown(base, other, UP)[0]
    assert rows(base, other)[UP].mark == "≠"


def test_a_tied_head_is_there_and_has_no_bytes(base: Path, edited: Callable[[Callable[[State], State]], Path]) -> None:
    other = edited(lambda state: {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for one, two, tied in ((base, other, 1), (other, base, 0)):
        row = rows(one, two)["lm_head.weight"]
        member = row.members[tied]
        assert (row.mark, row.pair is not None) == ("", True)
        assert member is not None
        assert (member.name, member.nbytes(open_checkpoint(other))) == (EMBEDDING, 0)
    assert f"is {EMBEDDING}" in shown(base, other, "lm_head")[0]


def test_stacked_experts_are_a_line_each(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{i}.up.weight" for i in range(2)]
    stacked = {"model.layers.0.mlp.experts.up": torch.zeros(2, 4, 4)}
    one = write_checkpoint(tmp_path / "one", {name.removesuffix(".weight"): torch.zeros(4, 4) for name in names})
    found = rows(one, write_checkpoint(tmp_path / "two", stacked))
    second = [row.members[1] for row in found.values()]
    assert [member and member.name for member in second] == [f"model.layers.0.mlp.experts.up[{i}]" for i in range(2)]
    assert {row.mark for row in found.values()} == {""}


def test_what_cannot_be_aligned_is_still_browsed(base: Path, tmp_path: Path) -> None:
    """A damaged quantised module: names are what is left."""
    quantize_tiny(base, tmp_path / "gptq")
    path = tmp_path / "gptq" / "model.safetensors"
    state = load_file(path)
    del state[UP.replace("weight", "scales")]
    save_file(state, path, {"format": "pt"})

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        assert "paired by equal names, and not compared: " in panel(browser)
        await search(browser, pilot, EMBEDDING)
        await until(pilot, lambda: "elements by magnitude" in panel(browser))
        assert "paired by equal names, and not compared: " in panel(browser)

    browse([base, tmp_path / "gptq"], steps)


def test_a_comparison_stops_when_the_cursor_moves(
    base: Path, edited: Callable[[Callable[[State], State]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = edited(lambda state: {**state, UP: state[UP] * 2})
    begun, ended, go_on = threading.Event(), threading.Event(), threading.Event()
    measured = Alignment.measure

    def measure(self: Alignment, pair: Pair, control: Control) -> TensorChange:
        begun.set()
        try:
            while not go_on.is_set():
                control.check()
                time.sleep(0.005)
            return measured(self, pair, control)
        finally:
            ended.set()

    monkeypatch.setattr(Alignment, "measure", measure)

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await search(browser, pilot, UP)
        await until(pilot, begun.is_set)
        await pilot.press("up")
        await until(pilot, ended.is_set)
        go_on.set()
        await pilot.press("down")
        await until(pilot, lambda: "scaled: B is A times a number" in panel(browser))
        assert "B is A times: 2" in panel(browser)

    browse([base, other], steps)


def test_no_weight_is_read_before_a_cursor_rests(tmp_path: Path) -> None:
    """And a comparison that is stopped leaves connections to servers to the next one."""
    folder = write_checkpoint(tmp_path / "m", {"z.large": torch.zeros(1 << 19)})  # beyond what comes with the header
    with Hub() as hub:
        for name in ("org/one", "org/two"):
            hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})
        with Web(endpoint=hub.endpoint) as web:
            control = Control(web=web)
            sides = [open_side(f"hf://{name}", control) for name in ("org/one", "org/two")]
            before = len(hub.log)
            subject = Subject.of(*sides, control=control)
            assert {request.name for request in hub.log[before:]} <= {"config.json"}
            pair, aligned = subject.rows["z.large"].pair, subject.alignment
            assert pair is not None
            assert aligned is not None
            stopped = Control(parent=control)
            stopped.stop()
            with pytest.raises(Interrupted, match="interrupted"):
                aligned.measure(pair, stopped)
            assert aligned.measure(pair, Control(parent=control)).kind == "identical"
