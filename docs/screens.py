"""Make the pictures of `weightops browse`: `python docs/screens.py`. They are what its screen shows of small models.

The text in them is held to the program by a test. Nothing in them comes from a network, web fonts included.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pictures import FOLDER, copy_model
from textual.widgets import Input, Static

from weightops.cli.browse.app import Browser
from weightops.cli.browse.subject import Subject, open_side
from weightops.engine.control import Control
from weightops.operations.inspect import Inspection

NARROW = FOLDER / "browse-80.svg"
WIDE = FOLDER / "browse-160.svg"
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"


def screen(folders: Sequence[Path], wanted: str, size: tuple[int, int]) -> str:
    """The screen, as SVG, once the first tensor that matches has been read."""

    async def drive() -> str:
        control = Control()
        sides = [open_side(folder, control) for folder in folders]
        named = [type(side)(side.checkpoint, renamed(side.inspection)) for side in sides]
        browser = Browser(Subject.of(*named, control=control), control)
        async with browser.run_test(size=size) as pilot:
            await pilot.press("slash")
            browser.query_one("#search", Input).value = wanted
            await pilot.pause()
            await pilot.press("enter")
            while "elements by magnitude" not in str(browser.query_one("#panel", Static).content):
                await pilot.pause(0.05)
            await pilot.press("escape")
            await pilot.pause()
            return browser.export_screenshot(title="weightops browse")

    return own_font(asyncio.run(drive()))


def renamed(found: Inspection) -> Inspection:
    """As if it had been named from the folder around it."""
    return replace(found, path=f"./{Path(found.path).name}")


def own_font(svg: str) -> str:
    """The picture with fonts that the reader has, in the place of some from a server."""
    return re.sub(r"font-family: ?[^;]*;", f"font-family: {FONT};", re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S))


def tuned(folder: Path) -> None:
    """A copy of the small model with one matrix that training has changed a little, and one tensor more."""
    import torch
    from safetensors.torch import load_file, save_file

    copy_model(folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    changed = tensors["model.layers.1.self_attn.q_proj.weight"]
    changed += (torch.randn(changed.shape[0], 4) @ torch.randn(4, changed.shape[1]) * 0.002).half()
    tensors["score.weight"] = torch.ones(1, changed.shape[1]).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def screens() -> dict[Path, str]:
    """The pictures by their files."""
    with tempfile.TemporaryDirectory() as name:
        base, other = Path(name, "model"), Path(name, "tuned")
        copy_model(base)
        tuned(other)
        return {
            NARROW: screen([base], "layers.0.self_attn.q_proj", (80, 30)),
            WIDE: screen([base, other], "layers.1.self_attn.q_proj", (160, 44)),
        }


def texts(svg: str) -> list[str]:
    """What a picture says, in pieces."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


if __name__ == "__main__":
    for path, picture in screens().items():
        path.write_text(picture, encoding="utf-8")
