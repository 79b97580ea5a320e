"""The screen of `weightops browse`, driven as a person would: what it shows, what it reads, and when it stops."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Fault, Hub
from support import write_checkpoint

pytest.importorskip("textual")

from textual.pilot import Pilot
from textual.widgets import Static

from weightops.cli.browse import app as screen
from weightops.cli.browse.app import Browser
from weightops.cli.browse.reading import Reading
from weightops.cli.browse.subject import Subject, open_side
from weightops.cli.browse.tree import ModuleTree
from weightops.engine.control import Control
from weightops.stores.web.web import Web

Steps = Callable[[Browser, Pilot[None]], Awaitable[None]]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_REST_S", 0.01)
    monkeypatch.setattr(screen, "_POLL_S", 0.05)


def model(folder: Path, **changes: torch.Tensor) -> Path:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(16, 4)}
    for i in range(12):
        tensors |= {f"model.layers.{i}.{n}.weight": torch.randn(4, 4) for n in ("attn.q", "attn.k", "norm")}
    return write_checkpoint(folder, {**tensors, "lm_head.weight": torch.ones(16, 4), **changes}, {"hidden_size": 4})


def browse(
    paths: Sequence[Path | str],
    steps: Steps,
    size: tuple[int, int] = (120, 40),
    control: Control | None = None,
) -> Browser:
    control = control or Control()

    async def drive() -> Browser:
        browser = Browser(Subject.of(*(open_side(path, control) for path in paths), control=control), control)
        async with browser.run_test(size=size) as pilot:
            await pilot.pause()
            await steps(browser, pilot)
        return browser

    return asyncio.run(drive())


def panel(browser: Browser) -> str:
    return str(browser.query_one("#panel", Static).content)


def lines(browser: Browser) -> list[str]:
    tree = browser.query_one(ModuleTree)
    nodes = [tree.get_node_at_line(number) for number in range(tree.last_line + 1)]
    return [node.label.plain if hasattr(node.label, "plain") else str(node.label) for node in nodes if node is not None]


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Wait for what comes of another thread."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, panel(pilot.app)  # type: ignore[arg-type]  # App, for Browser
        await pilot.pause(0.02)


async def search(browser: Browser, pilot: Pilot[None], text: str) -> None:
    await pilot.press("slash")
    browser.query_one("#search").value = text  # type: ignore[attr-defined]  # an Input
    await pilot.pause()
    await pilot.press("enter")
    await pilot.pause()


def test_modules_open_and_close(tmp_path: Path) -> None:
    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        assert sorted(lines(browser)) == ["all tensors", "lm_head.weight  F32 [16, 4]", "model  2.6 kB"]
        await search(browser, pilot, "layers.11.norm")
        shown = lines(browser)
        assert [line.split()[0] for line in shown if line.split()[0].isdecimal()] == [str(i) for i in range(12)]
        assert "norm.weight  F32 [4, 4]" in shown
        await pilot.press("left", "left")
        await pilot.pause()
        assert "norm.weight  F32 [4, 4]" not in lines(browser)
        await pilot.press("right")
        await pilot.pause()
        assert "norm.weight  F32 [4, 4]" in lines(browser)
        await pilot.press("z")
        await pilot.pause()
        assert len(lines(browser)) == 3

    browse([model(tmp_path / "m")], steps)


def test_the_tensor_under_the_cursor_is_read_and_shown(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, 1.5, -3.0, torch.nan], [2.0, 2.5, torch.inf, 0.25]])
    folder = model(tmp_path / "m", **{"lm_head.weight": values})

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await search(browser, pilot, "lm_head")
        await until(pilot, lambda: "xxh3_128" in panel(browser))
        shown = panel(browser)
        assert "lm_head.weight" in shown
        assert "float32 [2, 4]\n8 elements, 32 B" in shown
        assert "NaN   1" in shown
        assert "inf   1" in shown
        assert " ≥2^1 " in shown
        assert "in model.safetensors" in shown

    browse([folder], steps)


def test_search_goes_round_what_matches(tmp_path: Path) -> None:
    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        def under_cursor() -> str | None:
            item = browser.query_one(ModuleTree).item
            return item.name if item else None

        await search(browser, pilot, "LAYERS.1*.Q.")
        await until(pilot, lambda: under_cursor() is not None)
        seen = [under_cursor()]
        for key in ("n", "n", "n", "N"):
            await pilot.press(key)
            await pilot.pause()
            seen.append(under_cursor())
        numbers = [str(name).split(".")[2] for name in seen]
        assert sorted(numbers[:3]) == ["1", "10", "11"]
        assert numbers[3:] == [numbers[0], numbers[2]]
        await search(browser, pilot, "no such thing")
        assert "no tensor matches no such thing" in str(browser.query_one("#found", Static).content)

    browse([model(tmp_path / "m")], steps)


def test_config_and_metadata_are_a_key_away(tmp_path: Path) -> None:
    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await pilot.press("c")
        await until(pilot, lambda: '"hidden_size": 4' in panel(browser))
        await pilot.press("m")
        await until(pilot, lambda: "format: pt" in panel(browser))
        assert "38 tensors, " in panel(browser)
        await pilot.press("t")
        assert "all tensors" in panel(browser)

    browse([model(tmp_path / "m")], steps)


def test_two_checkpoints_side_by_side(tmp_path: Path) -> None:
    q = "model.layers.3.attn.q.weight"
    one = model(tmp_path / "one", **{"only.a": torch.ones(2), q: torch.ones(4, 4)})
    two = model(
        tmp_path / "two", **{"only.b": torch.ones(3), q: torch.full((4, 4), 1.5), "lm_head.weight": torch.ones(3, 4)}
    )
    (two / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        shown = lines(browser)
        assert "- only.a  F32 [2]" in shown or any("only" in line and line.endswith("*") for line in shown)
        assert "≠ lm_head.weight  F32 [16, 4]" in shown
        assert "- 1 only in A" in panel(browser)
        assert "+ 1 only in B" in panel(browser)
        assert "≠ 1 of another type or shape" in panel(browser)
        await search(browser, pilot, q)
        await until(pilot, lambda: "||B - A||" in panel(browser))
        assert "changed: 16 of 16 (100 %)" in panel(browser)
        assert "||B - A|| / ||A||: 0.5" in panel(browser)
        await search(browser, pilot, "layers.4.attn.q")
        await until(pilot, lambda: "identical: the same bytes" in panel(browser))
        await search(browser, pilot, "lm_head")
        await until(pilot, lambda: "more rows in A: 13, which are not compared" in panel(browser))
        await search(browser, pilot, "only.b")
        await until(pilot, lambda: "B xxh3_128" in panel(browser))
        assert "A  no partner: nothing here is this tensor" in panel(browser)
        await pilot.press("c")
        await until(pilot, lambda: '-  "hidden_size": 4' in panel(browser))
        assert '+  "hidden_size": 8' in panel(browser)

    browse([one, two], steps)


def test_a_reading_stops_when_the_cursor_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def read(name: str, row: Any, alignment: Any, control: Control) -> Reading:
        begun.set()
        try:
            while True:
                control.check()
                time.sleep(0.005)
        finally:
            ended.set()

    monkeypatch.setattr(screen, "read", read)

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await search(browser, pilot, "lm_head")
        await until(pilot, begun.is_set)
        assert "reading: 0 % of 256 B" in panel(browser)
        await pilot.press("up")
        await until(pilot, ended.is_set)
        begun.clear(), ended.clear()
        await search(browser, pilot, "lm_head")
        await until(pilot, begun.is_set)
        await pilot.press("q")

    browser = browse([model(tmp_path / "m")], steps)
    assert ended.wait(5)
    assert browser.return_code == 0


def test_what_cannot_be_read_is_a_sentence_in_the_panel(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        await search(browser, pilot, "lm_head")
        await until(pilot, lambda: "cannot be read: " in panel(browser))

    browse([folder], steps)


def test_hostile_names_and_settings_are_escapes_and_never_markup(tmp_path: Path) -> None:
    names = ["[red]x[/red].weight", "m.\x1b[31m\u202eevil.weight", "m.[@click=app.bell]y[/].weight", "", "a\nb"]
    folder = write_checkpoint(tmp_path / "m", {name: torch.ones(2) for name in names})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "k\u202e[b]": "\x1b]0;title\x07[/b]"}))

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await search(browser, pilot, "y[/]")
        await search(browser, pilot, "evil")
        await until(pilot, lambda: "xxh3_128" in panel(browser))
        shown = "\n".join(lines(browser)) + panel(browser)
        for text in ("[red]x[/red].weight", "\\x1b[31m\\u202eevil", "[@click=app.bell]y[/]", "a\\nb", "''"):
            assert text in shown
        await pilot.press("c")
        await until(pilot, lambda: "[/b]" in panel(browser))
        await pilot.press("m")
        await until(pilot, lambda: "metadata" in panel(browser))
        assert not set("\x1b\u202e\x07") & set(shown + panel(browser))

    browse([folder], steps)


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (20, 6)])
def test_any_size_of_screen_will_do(tmp_path: Path, size: tuple[int, int]) -> None:
    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await search(browser, pilot, "lm_head")
        await until(pilot, lambda: "xxh3_128" in panel(browser))
        await pilot.resize_terminal(size[1] * 2, size[0])
        await pilot.pause()

    browse([model(tmp_path / "m")], steps, size)


def test_a_signal_ends_it_with_its_code(tmp_path: Path) -> None:
    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        browser._control.cancel(15)
        await until(pilot, lambda: browser.return_code == 143)

    assert browse([model(tmp_path / "m")], steps).return_code == 143


def test_what_lies_on_a_server_waits_for_a_key(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", **{"z.large": torch.zeros(1 << 19)})  # beyond what is fetched with the header
    with Hub() as hub:
        hub.add("org/name", {path.name: path.read_bytes() for path in folder.iterdir()})

        async def steps(browser: Browser, pilot: Pilot[None]) -> None:
            await search(browser, pilot, "z.large")
            await pilot.pause(0.3)
            before = len(hub.log)
            assert "s reads it: 2.1 MB over the network" in panel(browser)
            await pilot.press("s")
            await until(pilot, lambda: "xxh3_128" in panel(browser))
            assert len(hub.log) > before
            await search(browser, pilot, "layers.7.norm")
            await pilot.press("s", "up", "down", "s")
            await until(pilot, lambda: "xxh3_128" in panel(browser))
            await pilot.press("c")
            await until(pilot, lambda: '"hidden_size": 4' in panel(browser))

        with Web(endpoint=hub.endpoint) as web:
            browse(["hf://org/name"], steps, control=Control(web=web))


def test_a_server_that_does_not_answer_keeps_nobody_from_leaving(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", **{"z.large": torch.zeros(1 << 19)})
    with Hub() as hub:
        hub.add("org/name", {path.name: path.read_bytes() for path in folder.iterdir()})

        async def steps(browser: Browser, pilot: Pilot[None]) -> None:
            hub.faults["model.safetensors"] = [Fault("stall", at=1000, value=120)] * 9
            before = len(hub.log)
            await search(browser, pilot, "z.large")
            await pilot.press("s")
            await until(pilot, lambda: len(hub.log) > before)
            await pilot.press("q")

        with Web(endpoint=hub.endpoint) as web:
            begun = time.monotonic()
            browse(["hf://org/name"], steps, control=Control(web=web))
            assert time.monotonic() - begun < 60


def test_gguf_files_and_single_files_are_browsed_too(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(20)])
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await pilot.press("m")
        await until(pilot, lambda: "general.architecture: llama" in panel(browser))
        assert "tokenizer.ggml.tokens: string [t0, t1, t2, t3, t4, t5, t6, t7, … 20 in all]" in panel(browser)
        await search(browser, pilot, "attn_q")
        await until(pilot, lambda: "xxh3_128" in panel(browser))

    browse([tmp_path / "m.gguf"], steps)

    async def beside(browser: Browser, pilot: Pilot[None]) -> None:
        await pilot.press("c")
        await until(pilot, lambda: '"hidden_size": 4' in panel(browser))

    browse([model(tmp_path / "m") / "model.safetensors"], beside)


def test_a_long_list_grows_as_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {f"w.{i}": torch.ones(1) for i in range(1200)})

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        await pilot.press("down", "right")
        await pilot.pause()
        assert len(lines(browser)) == 2 + 501
        assert lines(browser)[-1] == "… more: Enter adds them"
        await pilot.press("end", "enter")
        await pilot.pause()
        assert len(lines(browser)) == 2 + 1001
        await search(browser, pilot, "w.1199")
        await pilot.pause()
        item = browser.query_one(ModuleTree).item
        assert item is not None
        assert item.name == "w.1199"

    browse([folder], steps)
