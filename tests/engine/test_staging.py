"""Whose a folder is, what may be replaced, and whether an earlier run's work is still that of these sources."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killing import forked
from support import digests, write_checkpoint
from systems import needs_itself

import weightops
from weightops.engine import staging, targets
from weightops.engine.control import Control
from weightops.engine.publishing import partial
from weightops.errors import CorruptInput, Interrupted, OutputExists, PlanDiffers

PRECIOUS = "months of work"


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(3000 * i, 2, generator=generator) for i in range(1, 4)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", state(0), shards=3)


def shard(model: Path, **options: object) -> weightops.recipes.execute.Result:
    return weightops.shard(model, model.parent / "out", max_shard_size="source", workers=1, **options)


class StopAfter(Control):
    """Cancels itself when there are so many shards."""

    def __init__(self, folder: Path, shards: int) -> None:
        super().__init__()
        self._folder, self._shards = folder, shards

    def check(self) -> None:
        if len(list(self._folder.glob("output/model-*"))) >= self._shards:
            self.cancel()
        super().check()


def interrupt(model: Path, shards: int = 1, **options: object) -> None:
    with pytest.raises(Interrupted, match="interrupted"):
        shard(model, control=StopAfter(partial(model.parent / "out"), shards), **options)


def everything(folder: Path) -> dict[str, str]:
    """What is below a folder: links by target, files by content, folders by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_text("latin-1") if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = content
    return found


def a_file_in_it(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text(PRECIOUS)


def a_folder_in_it(path: Path) -> None:
    (path / "output/model").mkdir(parents=True)


def a_file(path: Path) -> None:
    path.write_text(PRECIOUS)


def a_link(path: Path) -> None:
    a_file_in_it(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")


def a_document(text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "run.json").write_text(text)
        (path / "model-00001-of-00003.safetensors").write_text(PRECIOUS)

    return make


def names_of_0_1(path: Path) -> None:
    path.mkdir()
    for name in (".lock", ".plan.json", ".journal.jsonl"):
        (path / name).write_text(PRECIOUS)


def a_stranger_in_ours(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        interrupt(path.parent / "model")
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(PRECIOUS)

    return make


def a_link_in_ours(path: Path) -> None:
    interrupt(path.parent / "model")
    a_file_in_it(path.parent / "elsewhere")
    (path / "output/config.json").symlink_to(path.parent / "elsewhere")
    (path / "output/sub").symlink_to(path.parent / "elsewhere")


def a_list_that_leads_out(path: Path) -> None:
    """Ours by its looks, with names that nobody may believe."""
    interrupt(path.parent / "model")
    document = json.loads((path / "run.json").read_text())
    document["files"] += ["../../model/model.safetensors.index.json", "/etc/passwd", "sub/../../x"]
    (path / "run.json").write_text(json.dumps(document))
    (path / "output/thesis.txt").write_text(PRECIOUS)


THEIRS = [
    a_file_in_it,
    a_folder_in_it,
    a_file,
    a_link,
    a_dangling_link,
    a_document("{}"),
    a_document("no json"),
    a_document("[" * 100_000),
    a_document('{"schema": "weightops-blocks/1"}'),
    names_of_0_1,
    a_stranger_in_ours("thesis.txt"),
    a_stranger_in_ours("output/thesis.txt"),
    a_stranger_in_ours("output/sub/model-00001-of-00003.safetensors"),
    a_stranger_in_ours("replaced/thesis.txt"),
    a_link_in_ours,
    a_list_that_leads_out,
]


@pytest.mark.parametrize("make", THEIRS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", [{}, {"restart": True}, {"overwrite": True}], ids=str)
def test_a_folder_of_somebody_else_is_left_alone(
    model: Path, make: Callable[[Path], None], options: dict[str, bool]
) -> None:
    make(partial(model.parent / "out"))
    before = everything(model.parent)
    with pytest.raises(OutputExists, match=r"out\.partial") as caught:
        shard(model, **options)
    assert caught.value.hint
    found = everything(model.parent)
    found.pop("out.partial/weightops.lock", None)  # says who looked
    before.pop("out.partial/weightops.lock", None)
    assert found == before


@pytest.mark.parametrize("name", ["out.partial.replaced", "out.replaced", "out.blocks", ".out.tmp"])
def test_other_names_beside_the_output_mean_nothing(model: Path, name: str) -> None:
    a_file_in_it(model.parent / name)
    (model.parent / "out").mkdir()
    shard(model)
    shard(model, overwrite=True)
    assert (model.parent / name / "thesis.txt").read_text() == PRECIOUS
    assert sorted(path.name for path in model.parent.iterdir()) == sorted(["model", "out", name])


@pytest.mark.parametrize("name", [".lock", ".journal.jsonl", ".plan.json", "weightops.lock", "run.json", "data"])
def test_a_refused_output_keeps_every_byte(model: Path, name: str) -> None:
    (model.parent / "out").mkdir()
    (model.parent / "out" / name).write_text(PRECIOUS)
    before = everything(model.parent)
    with pytest.raises(OutputExists, match="out exists"):
        shard(model)
    assert everything(model.parent) == before


def at_the_end(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something when all is written and nothing published."""
    original = staging.Staging.finish

    def finish(self: staging.Staging) -> None:
        original(self)
        act()

    monkeypatch.setattr(staging.Staging, "finish", finish)


@pytest.mark.parametrize("make", [a_file_in_it, a_file, a_link, a_dangling_link], ids=lambda make: make.__name__)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_output_meanwhile_is_not_replaced(
    model: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], overwrite: bool
) -> None:
    out = model.parent / "out"
    with monkeypatch.context() as patch:
        at_the_end(patch, lambda: make(out))
        with pytest.raises(
            OutputExists, match=r"out appeared while this run was at work.*whole, in .*out.partial/output"
        ):
            shard(model, overwrite=overwrite)
    assert PRECIOUS in {*everything(model.parent).values()} or make is a_dangling_link
    out.rename(model.parent / "theirs")
    assert len(shard(model, overwrite=overwrite).resumed) == 3
    assert sorted(p.name for p in model.parent.iterdir() if p.name != "elsewhere") == ["model", "out", "theirs"]


def test_an_empty_folder_that_appears_is_a_place_to_publish(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_end(monkeypatch, (model.parent / "out").mkdir)
    shard(model)
    assert (model.parent / "out/weightops-manifest.json").exists()


def test_a_folder_that_overwrite_was_not_said_of_is_not_replaced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model.parent / "out"
    out.mkdir()
    (out / "old").write_text("old")

    def swap() -> None:
        out.rename(model.parent / "aside")
        a_file_in_it(out)

    at_the_end(monkeypatch, swap)
    with pytest.raises(OutputExists, match="appeared while this run was at work"):
        shard(model, overwrite=True)
    assert (out / "thesis.txt").read_text() == PRECIOUS


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_overwriting_with_and_without_an_exchange_of_names(
    model: Path, monkeypatch: pytest.MonkeyPatch, is_exchanged: bool
) -> None:
    reference = digests(shard(model).out)
    (model.parent / "out/old").write_text("old")
    if not is_exchanged:
        monkeypatch.setattr(targets, "exchange", lambda first, second: False)
    shard(model, overwrite=True)
    assert digests(model.parent / "out") == reference
    assert sorted(path.name for path in model.parent.iterdir()) == ["model", "out"]


@needs_itself("fork")
@pytest.mark.parametrize("asks_first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_old_output_is_never_lost_where_names_cannot_be_exchanged(
    model: Path, monkeypatch: pytest.MonkeyPatch, asks_first: bool
) -> None:
    """Killed at any change to the disk, one of the two is at OUT, or comes back there with the next run."""
    monkeypatch.setattr(targets, "exchange", lambda first, second: False)
    reference = digests(shard(model).out)
    out = model.parent / "out"
    arguments = ["shard", str(model), "--out", str(out), "--max-shard-size", "source", "--workers", "1", "--overwrite"]
    lost = 0
    for fatal in range(40 if asks_first else 50, 200):
        (out / "old").write_text("old")
        if forked(arguments, fatal) == 0:
            break
        if not out.exists():
            lost += 1
            assert (model.parent / "out.partial/replaced/old").read_text() == "old"
            if asks_first:
                with pytest.raises(OutputExists, match="out exists"):
                    shard(model)
                assert (out / "old").read_text() == "old"
        assert forked(arguments, None) == 0
        assert digests(out) == reference
    assert lost == 1


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\xfe\x00", b"[" * 100_000 + b"\n", b"{}\n", b'{"done": "shard"}\n', b"null\n", b"\0" * 5000 + b"\n"],
    ids=repr,
)
@pytest.mark.parametrize("place", ["instead", "behind"])
def test_a_damaged_journal_is_believed_as_far_as_it_goes(model: Path, damage: bytes, place: str) -> None:
    interrupt(model, 2)
    journal = model.parent / "out.partial/journal.jsonl"
    good = journal.read_bytes() if place == "behind" else b""
    journal.write_bytes(good + damage)
    done = shard(model)
    assert len(done.resumed) == (2 if place == "behind" else 0)
    assert digests(done.out) == digests(weightops.shard(model, model.parent / "ref", max_shard_size="source").out)


def test_another_plan_is_named_by_what_differs_and_may_be_thrown_away(model: Path) -> None:
    interrupt(model)
    with pytest.raises(PlanDiffers, match="container was"):
        shard(model, format="torch")
    assert shard(model, format="torch", restart=True).resumed == ()
    assert sorted(path.name for path in model.parent.iterdir()) == ["model", "out"]


def other_model(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Another model under the same names, of the same sizes and dates, as images and archives make them."""
    times = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    model.rename(model.parent / "first")
    write_checkpoint(model, change(state(0)), shards=3)
    for name, mtime_ns in times.items():
        os.utime(model / name, ns=(mtime_ns, mtime_ns))


def middle_of(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[tensors[name].numel() // 2] += 1
        return tensors

    return change


@pytest.mark.parametrize("change", [lambda _: state(1), middle_of("w1")], ids=["all", "middle"])
@pytest.mark.parametrize("shards", [1, 2])
def test_work_is_not_continued_with_another_model_of_the_same_name_size_and_date(
    model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], shards: int
) -> None:
    interrupt(model, shards)
    other_model(model, change)
    done = shard(model)
    assert done.resumed == ()
    assert any("but other contents: begun anew" in warning for warning in done.warnings)
    assert digests(done.out) == digests(weightops.shard(model, model.parent / "ref", max_shard_size="source").out)


def test_work_is_continued_where_only_the_place_has_changed(model: Path) -> None:
    interrupt(model, 2)
    other_model(model, lambda tensors: tensors)
    assert len(shard(model).resumed) == 2


def test_the_output_of_another_model_is_not_taken_for_that_of_this_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between publishing and cleaning up, then the same command with another model."""
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "clean", lambda self: None)
        shard(model)
    assert len(shard(model).resumed) == 3
    shard(model, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "clean", lambda self: None)
        shard(model, overwrite=True)
    other_model(model, lambda _: state(1))
    with pytest.raises(OutputExists, match="out exists"):
        shard(model)


def test_what_was_watched_is_watched_again_with_other_sources(tmp_path: Path) -> None:
    """An exact delta looks at its base first; a base that was right is not one that came in its place."""
    raw = write_checkpoint(tmp_path / "model", state(0), shards=3)
    write_checkpoint(tmp_path / "tuned", {name: tensor + 1 for name, tensor in state(0).items()}, shards=3)
    weightops.diff(raw, tmp_path / "tuned", tmp_path / "delta")
    stop = StopAfter(tmp_path / "out.partial", 1)
    with pytest.raises(Interrupted, match="interrupted"):
        weightops.recover(raw, tmp_path / "delta", tmp_path / "out", max_shard_size="source", workers=1, control=stop)
    other_model(raw, lambda _: state(1))
    with pytest.raises(weightops.errors.IncompatibleInputs, match="is not the base"):
        weightops.recover(raw, tmp_path / "delta", tmp_path / "out", max_shard_size="source", workers=1)


def test_folders_on_the_way_to_the_output_are_made(model: Path) -> None:
    weightops.shard(model, model.parent / "new/deep/out")
    assert (model.parent / "new/deep/out/weightops-manifest.json").exists()


def test_a_root_is_no_output(model: Path) -> None:
    with pytest.raises(weightops.errors.UsageError, match="cannot be an output"):
        weightops.shard(model, "/")


def test_sidecars_are_copied_piece_by_piece_and_held_against_what_was_planned(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 12_345
    (model / "tokenizer.json").write_bytes(data)
    done = shard(model, digest=["sha256"])
    assert (done.out / "tokenizer.json").read_bytes() == data
    assert done.manifest is not None
    assert done.manifest.files["tokenizer.json"].nbytes == len(data)
    (model / "tokenizer.json").write_bytes(data)  # of another time

    at = staging.Staging.commit

    def commit(*args: object) -> None:
        at(*args)  # type: ignore[arg-type]
        (model / "tokenizer.json").write_bytes(b"shorter")

    monkeypatch.setattr(staging.Staging, "commit", commit)
    with pytest.raises(CorruptInput, match=r"tokenizer\.json: changed while it was being read"):
        shard(model, overwrite=True)
    assert (done.out / "tokenizer.json").read_bytes() == data


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"fingerprint": None, "files": None, "plan": None},
        {"fingerprint": "x", "files": ["a", None, 3], "plan": {"shards": [{"name": None}], "recipe": 5}},
        {"fingerprint": 5, "finished": None, "replaces": "x", "files": {"a": 1}, "plan": [[None]]},
        {"fingerprint": "x", "plan": {"container": "safetensors", "shards": [{"nbytes": None}]}},
    ],
    ids=str,
)
def test_a_damaged_plan_is_another_plan(model: Path, document: dict[str, object]) -> None:
    folder = partial(model.parent / "out")
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"schema": staging.SCHEMA, **document}))
    with pytest.raises(PlanDiffers, match=r"is the partial output of another plan: \w.* was .*, now "):
        shard(model)
    assert shard(model, restart=True).manifest is not None
