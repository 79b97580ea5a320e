"""The pages of `quantize --html` and `check --html`: what they say, to whom, and that nothing in them can act."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, text

from weightops import api
from weightops.cli.main import run
from weightops.cli.pages import check as check_html
from weightops.cli.pages import compare as compare_html
from weightops.cli.pages import html as html_page
from weightops.cli.pages import quantize as quantize_html
from weightops.cli.pages.heat_map import Cell, Scale, heat_map
from weightops.quantization.options import ModuleReport

COLOURS = ["n4", "n3", "n2", "n1", "m", "p1", "p2", "p3", "p4"]
HOSTILE = 'x\x1b[31m"><script>alert(1)</script><img src="//x">&'
VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """What a browser makes of a page; fails where tags do not match."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def titles(self) -> list[str]:
        return [attrs["title"] or "" for _, attrs in self.tags if "title" in attrs]


def report(
    name: str, error: float | None, *, rounding: float | None = 1e-3, fallback: str | None = None
) -> ModuleReport:
    return ModuleReport(
        module=name, in_features=64, out_features=64, error=error, error_rtn=rounding, fallback=fallback
    )


MODULES = [
    *(report(f"model.layers.{i}.mlp.up_proj", 1e-4 * 4**i) for i in range(3)),
    report("model.layers.0.self_attn.q_proj", None, rounding=None),
    report("model.layers.1.self_attn.q_proj", 1e-3, fallback="its Hessian is singular"),
]


def quantize_page(modules: list[ModuleReport] = MODULES) -> str:
    return quantize_html.page("model", modules).decode()


def check_page(folder: Path) -> str:
    layers = {f"model.layers.{i}.{name}": torch.randn(8, 8) for i in range(3) for name in ("up.weight", "down.weight")}
    layers["model.layers.1.up.weight"][0, 0] = math.nan
    integers = {f"model.layers.{i}.up.qweight": torch.ones((8, 8), dtype=torch.int32) for i in range(3)}
    save_file(layers | integers, folder / "model.safetensors")
    return check_html.page(api.check(folder)).decode()


def compare_page(folder: Path) -> str:
    """Of a model with every kind of change that has a place of its own on the page, and of what it says of a text."""
    save_tiny(folder / "base", "llama")
    shutil.copytree(folder / "base", folder / "changed")
    state = load_file(folder / "changed/model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 7] = math.nan
    state["model.layers.1.self_attn.v_proj.weight"][16:] *= 2
    state["model.embed_tokens.weight"][40] += 1
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, folder / "changed/model.safetensors", {"format": "pt"})
    (folder / "changed/chat_template.jinja").write_text("{{ messages }}")
    (folder / "changed/config.json").write_text("{}")
    return compare_html.page(api.compare(folder / "base", folder / "changed")).decode()


@pytest.mark.parametrize(
    "make", [lambda folder: quantize_page(), check_page, compare_page], ids=["quantize", "check", "compare"]
)
def test_a_page_is_one_file_for_every_reader_that_fetches_and_runs_nothing(
    make: Callable[[Path], str], tmp_path: Path
) -> None:
    source = make(tmp_path)
    found = Page(source)
    tags = {tag for tag, _ in found.tags}
    attributes = {name for _, attrs in found.tags for name in attrs}
    assert not tags & {"script", "img", "link", "iframe", "object", "form", "a"}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "style")}
    assert "url(" not in source
    assert "://" not in source
    policies = [attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert ("html", {"lang": "en"}) in found.tags
    assert any(attrs.get("name") == "viewport" for _, attrs in found.tags)
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in found.tags if tag == "th")
    for attrs in (attrs for _, attrs in found.tags if attrs.get("class") == "scroll"):
        assert (attrs["role"], attrs["tabindex"]) == ("region", "0")
        assert attrs["aria-label"]
    for table in re.findall(r"<table.*?</table>", source, re.DOTALL):
        widths = {len(re.findall("<t[dh]", row)) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)}
        assert len(widths) == 1


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb`, by WCAG 2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    levels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_either_scheme(scheme: str) -> None:
    steps = html_page.COLOURS[scheme]
    assert list(steps) == COLOURS
    assert min(contrast(*pair) for pair in steps.values()) >= 4.5
    grounds = [luminance(ground) for ground, _ in steps.values()]
    outward = [*pairwise(grounds[4:]), *pairwise(grounds[4::-1])]
    assert all((a > b) == (scheme == "light") for a, b in outward)  # so it works without colour, too
    ink = dict(pair.split(":") for pair in html_page.INK[scheme].split(";"))
    for name in ("--ink", "--faint", "--error", "--warning"):
        assert contrast(ink[name], ink["--ground"]) >= 4.5


POSITIVE = st.floats(1e-30, 1e30)


@given(POSITIVE, POSITIVE, POSITIVE, st.sampled_from([0.5, 1.0]))
def test_colours_follow_the_values(a: float, b: float, middle: float, step: float) -> None:
    scale = Scale(step=step)
    low, high = (COLOURS.index(scale.colour(value, middle)) for value in sorted((a, b)))
    assert low <= high
    assert scale.colour(middle, middle) == "m"


@pytest.mark.parametrize(
    ("value", "middle", "colour"),
    [(2.0, 1.0, "p2"), (0.5, 1.0, "n2"), (9.0, 1.0, "p4"), (0.0, 1.0, "n4"), (1.0, 0.0, "p4"), (0.0, 0.0, "m"),
     (math.nan, 1.0, "odd"), (math.inf, 1.0, "odd")],
)  # fmt: skip
def test_colours_at_the_edges(value: float, middle: float, colour: str) -> None:
    assert Scale().colour(value, middle) == colour


def test_every_kind_of_cell_is_explained() -> None:
    columns = {"a": {0: Cell(1.0), 1: Cell(None), 2: Cell(math.nan)}, "b": {0: Cell(4.0, "a note")}}
    found = Page(heat_map("title", columns, Scale(), unit="%", marked="what the dagger says"))
    for words in ("times the median of its column", "not measured", "not a finite number", "blank: the layer has no"):
        assert words in found.text
    assert "\N{DAGGER} what the dagger says" in found.text
    assert "layer 0, b: 4 %, 1 times the median of its column; a note" in found.titles()
    plain = Page(heat_map("title", {"a": {0: Cell(1.0)}}, Scale()))
    assert not any(words in plain.text for words in ("not measured", "not a finite", "blank", "\N{DAGGER}"))


def test_quantize_says_which_layer_stands_out_and_which_fell_back() -> None:
    source = quantize_page()
    found = Page(source)
    errors, _, ratios = source.partition("Error as a multiple of that of rounding</h2>")
    assert re.findall(r'class="(\w+)" title="block 2, mlp.up_proj: ([^"]*)"', errors) == [
        ("p4", "0.16 %, 4 times the median of its column")
    ]
    assert re.findall(r'class="(\w+)" title="block 2, mlp.up_proj: ([^"]*)"', ratios) == [
        ("p1", "1.6 times the error of rounding to nearest")
    ]
    assert "block 0, self_attn.q_proj: not measured" in found.titles()
    listed = found.text.partition("Rounded to nearest after all")[2]
    assert "model.layers.1.self_attn.q_projits Hessian is singular" in listed


def test_rounding_without_data_has_a_page_that_says_so() -> None:
    found = Page(quantize_page([report("model.layers.0.up", None, rounding=None)]))
    assert "No errors were measured" in found.text
    assert "times the median" not in found.text


def test_names_and_reasons_do_nothing_to_a_page() -> None:
    modules = [report(f"{HOSTILE}.{i}.{HOSTILE}", 1e-3, fallback=HOSTILE) for i in range(2)]
    source = quantize_html.page(HOSTILE, modules, {HOSTILE: HOSTILE}).decode()
    found = Page(source)
    assert "\x1b" not in source
    assert not {tag for tag, _ in found.tags} & {"script", "img"}
    assert found.text.count('x\\x1b[31m"><script>alert(1)</script><img') > 6


def test_quantize_writes_the_page_with_the_facts_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=2)
    Path("text.txt").write_text(text(60))
    line = ["quantize", "model", "--out", "out", "--bits", "3", "--group-size", "32", "--calibration", "text.txt"]
    assert run([*line, "--samples", "4", "--seq-len", "32", "--html", "page.html", "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = Page(Path("page.html").read_text())
    words = found.text.split("Error: ")[0]
    for fact in ("bits3", "group size32", "calibration128 tokens", f"per weight{document['bits_per_weight']:.3f}"):
        assert fact in words
    n_measured = sum(module["error"] is not None for module in document["modules"])
    assert sum(title.startswith("block ") for title in found.titles()) == 2 * n_measured == 28


def test_check_s_maps_name_their_stack_and_leave_integers_out(tmp_path: Path) -> None:
    found = Page(check_page(tmp_path))
    assert "model.layers: standard deviation" in found.text
    assert "Tensors of integers, such as packed weights, are not in the maps" in found.text
    assert not any("qweight" in title for title in found.titles())
    assert sum("layer 1, up.weight" in title and title.endswith("; 1 NaN") for title in found.titles()) == 2


def test_what_changed_is_seen_at_a_glance(tmp_path: Path) -> None:
    found = Page(compare_page(tmp_path))
    titles = found.titles()
    assert "layer 0, mlp.down_proj.weight: = %" in "".join(titles)
    assert any(t.startswith("layer 0, mlp.up_proj.weight: nan %; equal but for NaN") for t in titles)
    assert any(t.startswith("layer 2, mlp.up_proj.weight: not measured; it has no partner") for t in titles)
    assert any("layer 1, self_attn.v_proj.weight: " in t and "a few attention heads changed" in t for t in titles)
    order = [found.text.index(part) for part in ("B is A but for 3 of", "What to see first", "‖B-A‖/‖A‖", "Settings")]
    assert order[0] < order[1] < order[3]
    assert "1 of 320 rows: 40 “G”" in found.text


def test_amounts_are_red_from_zero_up() -> None:
    scale = Scale(middle=8.0, step=1.0, is_amount=True)
    assert [scale.colour(value, 8.0) for value in (0, 1e-9, 1, 2, 4, 8, math.nan)] == [
        *("m", "p1", "p1", "p2", "p3", "p4", "odd")
    ]
