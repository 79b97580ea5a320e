"""Pages of HTML: one file each, without scripts, that fetch nothing and read well light, dark, narrow and printed."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from weightops.cli.output import escape_lines
from weightops.io.escape import escape

COLOURS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "light": {
        "n4": ("#2166ac", "#fff"),
        "n3": ("#4393c3", "#000"),
        "n2": ("#92c5de", "#000"),
        "n1": ("#d1e5f0", "#000"),
        "m": ("#f2f2f2", "#000"),
        "p1": ("#fddbc7", "#000"),
        "p2": ("#f4a582", "#000"),
        "p3": ("#dd6f53", "#000"),
        "p4": ("#b2182b", "#fff"),
    },
    "dark": {
        "n4": ("#8ecbff", "#000"),
        "n3": ("#4da0e0", "#000"),
        "n2": ("#22608f", "#fff"),
        "n1": ("#1d3c57", "#fff"),
        "m": ("#303034", "#fff"),
        "p1": ("#553026", "#fff"),
        "p2": ("#8f452b", "#fff"),
        "p3": ("#e0794a", "#000"),
        "p4": ("#ffb999", "#000"),
    },
}
"""Background and text by colour scheme and step: from blue (far below) to red (far above), as ColorBrewer's RdBu,
which readers who do not tell red from green can tell apart."""
INK: Mapping[str, str] = {
    "light": "--ink:#1a1a1a;--faint:#595959;--line:#d4d4d4;--ground:#fff;--error:#a3211a;--warning:#7a4f00;"
    "--good:#1d6b2f",
    "dark": "--ink:#ececec;--faint:#ababab;--line:#47474b;--ground:#18181a;--error:#ff9a90;--warning:#f2c268;"
    "--good:#8fd6a0",
}
"""Text, lines and background by colour scheme, as CSS."""
_RULES = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5em clamp(.8em, 3vw, 2.5em); max-width: 88em;
  color: var(--ink); background: var(--ground); }
h1 { font-size: 1.5em; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.12em; margin: 2em 0 .3em; }
p { margin: .3em 0; max-width: 46em; } .faint, caption { color: var(--faint); }
dl { display: flex; flex-wrap: wrap; gap: .7em 2em; margin: 1.2em 0; } .kicker { margin: 0; color: var(--faint); }
dt { color: var(--faint); font-size: .85em; } dd { margin: 0; font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 .6em; }
td, th { padding: .2em .6em; text-align: left; vertical-align: top; font-weight: normal; }
thead th { color: var(--faint); } .list td { overflow-wrap: anywhere; }
.list td:not(:last-child) { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; } .list tbody tr { border-top: 1px solid var(--line); }
.error td:first-child { color: var(--error); font-weight: 600; }
.warning td:first-child { color: var(--warning); font-weight: 600; } .hint { color: var(--faint); }
.scroll { overflow: auto; max-height: 88vh; position: relative; scrollbar-gutter: stable; }
.scroll:focus-visible { outline: 2px solid; }
.side { display: flex; flex-wrap: wrap; gap: 0 2em; align-items: start; } .side > * { min-width: 0; }
.map { font-size: 12px; border-collapse: separate; border-spacing: 0; }
.map td, .map th { border: 0 solid var(--ground); border-width: 0 1px 1px 0; }
.map td { min-width: 4.6em; text-align: right; padding: .15em .4em; white-space: nowrap; }
.map thead { position: sticky; top: 0; z-index: 2; } .map thead th, .map thead td { background: var(--ground); }
.map thead th { width: 1px; text-align: right; vertical-align: bottom; color: var(--ink); padding: .15em .4em; }
.map .middle th, .map .middle td { color: var(--faint); padding-bottom: .4em; }
.map th:first-child { position: sticky; left: 0; z-index: 1; text-align: right; background: var(--ground); }
.map tbody tr:hover th { font-weight: 700; }
.map tbody td:hover { outline: 2px solid var(--ink); outline-offset: -1px; }
.none { background: repeating-linear-gradient(135deg, transparent 0 5px, var(--line) 5px 6px); }
.odd { outline: 2px dashed var(--error); outline-offset: -2px; }
.legend { font-size: 12px; margin: .4em 0 .6em; max-width: 36em; } .legend span { padding: 0 .4em; }
.lead { font-size: 1.2em; max-width: 42em; margin: 1em 0 .5em; }
.brief td { white-space: normal !important; min-width: 4.5em; } .wide th[scope=row] { min-width: 12em; }
.wide td:last-child { min-width: 18em; }
pre { font-size: 12px; line-height: 1.4; margin: .3em 0 1em; } .plus { color: var(--good); }
.minus { color: var(--error); }
.strip { display: flex; list-style: none; margin: .2em 0; padding: 0; font-size: 11px; }
.strip li { flex: 1; text-align: center; padding: .1em 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17em), 1fr)); gap: .6em 1.8em; }
.answers section { min-width: 0; border-top: 1px solid var(--line); padding-top: .3em; }
h3 { font-size: 1em; margin: 1.6em 0 0; } h4 { font-size: .9em; margin: 0; overflow-wrap: anywhere; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: none; color: var(--error); font-weight: 600; text-decoration: underline; }
@media print { .scroll { overflow: visible; max-height: none; } .map thead { position: static; }
  td, li { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
_HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)


def page(command: str, name: str, parts: Iterable[str]) -> bytes:
    """A page, in UTF-8, of what a command did to or found in `name`, made of pieces of HTML."""
    head = f"{_HEAD}<title>{text(command)}: {text(name)}</title><style>{_style()}</style></head><body><main>"
    return "\n".join(
        [head, f'<p class="kicker">{text(command)}</p><h1>{text(name)}</h1>', *parts, "</main></body></html>\n"]
    ).encode()


def _style() -> str:
    schemes = {name: f":root{{color-scheme:{name};{ink}}}{_steps(name)}" for name, ink in INK.items()}
    return f"{schemes['light']}\n@media screen and (prefers-color-scheme: dark){{{schemes['dark']}}}{_RULES}"


def _steps(scheme: str) -> str:
    return "".join(f".{step}{{background:{ground};color:{ink}}}" for step, (ground, ink) in COLOURS[scheme].items())


def text(value: str) -> str:
    """A name from anywhere, as HTML; shortened if it is absurdly long."""
    return html.escape(escape(value))


def long_text(value: str) -> str:
    """Text of any length, such as a sentence with names in it, as HTML."""
    return html.escape(escape_lines(value))


def dotted(name: str) -> str:
    """A name from anywhere as HTML that may be broken after its dots and underscores."""
    return re.sub(r"(?<=[._])(?=[^._])", "<wbr>", text(name))


def facts(found: Mapping[str, str]) -> str:
    """What is to be known first: names, and values in bold."""
    return f"<dl>{''.join(f'<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>' for k, v in found.items())}</dl>"


def scrolled(label: str, table: str) -> str:
    """A wide or long table in a frame of its own, which the keyboard reaches and a screen reader names."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">{table}</div>'


def side_by_side(parts: Iterable[str]) -> str:
    """Sections beside each other where there is room, else below."""
    return f'<div class="side">{"".join(parts)}</div>'


def listing(heads: Sequence[str], rows: Iterable[str], caption: str = "") -> str:
    """A table under a heading for each column, of rows that are HTML from `<tr>` on."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<table class="list">{named}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
