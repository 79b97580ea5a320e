"""Make README's pictures from what the program really says and writes: `python docs/pictures.py`.

terminal.svg is the output of commands on the small model of the tests; a test holds the two together. report.png is a
page of `weightops check --html`, comparison.png one of `weightops compare --html`, and page.png that of `weightops
serve`, photographed by Chromium; they are left as they are where there is none, or no Pillow or playwright.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER.parent / "tests/data/tiny-llama"
TERMINAL = FOLDER / "terminal.svg"
REPORT = FOLDER / "report.png"
COMPARISON = FOLDER / "comparison.png"
PAGE = FOLDER / "page.png"
COMMANDS = [
    "weightops shard ./model --max-shard-size 2MB --workers 1 --out ./release",
    "printf x | dd of=release/model-00002-of-00003.safetensors bs=1 seek=99999 conv=notrunc status=none",
    "weightops verify ./release; echo exit code $?",
]
COLUMNS, CHARACTER, LINE, MARGIN = 104, 8.4, 19, 18
COLOURS = {": ok": "#7ee2a8", "differs": "#ff9a90", "NOT": "#ff9a90", "Warning": "#f2c268"}
"""Of lines that hold these words."""


def copy_model(folder: Path) -> None:
    """The small model, without what the tests keep beside it."""
    folder.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(MODEL / name, folder)


def session() -> list[str]:
    """What a terminal shows of the commands."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        copy_model(Path(name, "model"))
        program = Path(name, "bin/weightops")
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m weightops "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
        for command in COMMANDS:
            lines.append(f"$ {command}")
            arguments = ["bash", "-c", f"exec 2>&1; {command}"]
            done = subprocess.run(arguments, cwd=name, env=environment, text=True, capture_output=True, check=True)
            lines += done.stdout.splitlines()
    return lines


def draw(lines: list[str]) -> str:
    """A terminal with these lines, as SVG; long ones go on in the next, as terminals have them."""
    rows = [(line[i : i + COLUMNS], line) for line in lines for i in range(0, max(len(line), 1), COLUMNS)]
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), len(rows) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<title>weightops verify finds a damaged byte</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#18181a"/>',
        '<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="14">',
    ]
    for number, (row, line) in enumerate(rows):
        colour = next((colour for word, colour in COLOURS.items() if word in line), "#ececec")
        colour = "#8ecbff" if line.startswith("$ ") else colour
        place = f'x="{MARGIN}" y="{MARGIN + LINE * number + 14}"'
        length = f'textLength="{len(row) * CHARACTER:.1f}"' if row else ""
        parts.append(f'<text {place} {length} fill="{colour}" xml:space="preserve">{escape(row)}</text>')
    return "\n".join([*parts, "</g></svg>", ""])


def photograph() -> None:
    """A report of a copy of the model with two faults in it."""
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as name:
        model = Path(name, "my-model")
        copy_model(model)
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.2.mlp.up_proj.weight"][17, 5] = torch.nan
        tensors["model.layers.3.self_attn.o_proj.weight"] *= 40
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        page = Path(name, "report.html")
        subprocess.run(
            [sys.executable, "-m", "weightops", "check", model, "--quiet", "--html", page],
            check=True,
            capture_output=True,
        )
        take(page, "980,660", REPORT)


def photograph_comparison() -> None:
    """What changed between the model and a copy: a head, two tokens, a merged LoRA, a layer that was trained."""
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as name:
        base, tuned, page = Path(name, "base"), Path(name, "tuned"), Path(name, "page.html")
        for folder in (base, tuned):
            copy_model(folder)
        tensors, draw = load_file(tuned / "model.safetensors"), torch.Generator().manual_seed(0)
        for key, tensor in tensors.items():
            if "layers.2.mlp" in key:
                noise = torch.randn(tensor.shape, generator=draw) * 0.01 * tensor.float().std()
                tensor += noise.to(tensor.dtype)
        values = tensors["model.layers.0.self_attn.v_proj.weight"]
        factors = [torch.randn(size, generator=draw) for size in ((len(values), 4), (4, values.shape[1]))]
        values += (factors[0] @ factors[1] * 0.01).to(values.dtype)
        tensors["model.layers.1.self_attn.q_proj.weight"][:32] *= 1.5
        tensors["model.embed_tokens.weight"][[7, 19]] *= 2
        save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
        subprocess.run(
            [sys.executable, "-m", "weightops", "compare", base, tuned, "--quiet", "--html", page],
            check=True,
            capture_output=True,
        )
        take(page, "980,800", COMPARISON)


def take(page: Path, size: str, out: Path) -> None:
    """A picture of a page in a file."""
    from PIL import Image

    picture = page.with_suffix(".png")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    browser += ["--disable-background-networking", "--hide-scrollbars", "--force-device-scale-factor=2"]
    subprocess.run(
        [*browser, f"--window-size={size}", f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True
    )
    Image.open(picture).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


def photograph_page() -> None:
    """The page of a server, with the model beside copies of it that were quantised to 4 and to 2 bits."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as name:
        model, picture = Path(name, "model"), Path(name, "page.png")
        copy_model(model)
        program = [sys.executable, "-m", "weightops"]
        quantized = {f"model-{bits}bit": Path(name, f"model-{bits}bit") for bits in (4, 2)}
        for bits, out in zip((4, 2), quantized.values(), strict=True):
            how = ["--method", "rtn", "--bits", str(bits), "--group-size", "32", "--quiet"]
            subprocess.run([*program, "quantize", model, *how, "--out", out], check=True, capture_output=True)
        named = [f"model={model}", *(f"{label}={folder}" for label, folder in quantized.items())]
        served = subprocess.Popen([*program, "serve", *named, "--port", "0"], stderr=subprocess.PIPE, text=True)
        try:
            assert served.stderr is not None
            address = next(line for line in served.stderr if "http://" in line).split(" at ")[1].split()[0]
            with sync_playwright() as started:
                browser = started.chromium.launch(executable_path=shutil.which("chromium"))
                page = browser.new_page(viewport={"width": 980, "height": 600}, device_scale_factor=2)
                page.goto(address)
                page.wait_for_selector(".column")
                for field in page.locator("[name=max_tokens]").all():
                    field.evaluate("e => { e.value = 40; e.dispatchEvent(new Event('change')) }")
                page.fill("#prompt", "And the lion said")
                page.click("#send")
                page.wait_for_selector("#send:not([disabled])", timeout=120_000)
                page.screenshot(path=picture)
                browser.close()
        finally:
            served.terminate()
            served.wait()
        Image.open(picture).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(PAGE, optimize=True)


if __name__ == "__main__":
    TERMINAL.write_text(draw(session()), encoding="utf-8")
    for draw_it, picture in ((photograph, REPORT), (photograph_comparison, COMPARISON), (photograph_page, PAGE)):
        try:
            draw_it()
        except (FileNotFoundError, ImportError) as missing:
            print(f"{picture.name} stays as it is: {missing}")
