"""Markdown as nodes: nothing but plain elements, whatever a model says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

pytest.importorskip("nh3", reason="the extra `web` is not installed")

from weightops.serve.errors import ApiError
from weightops.serve.render import MAX_CHARACTERS, TAGS, Node, render


def tags(nodes: list[Node]) -> Iterator[tuple[str, dict[str, str]]]:
    for node in nodes:
        if isinstance(node, list):
            yield node[0], node[1]
            yield from tags(node[2])


def text(nodes: list[Node]) -> str:
    return "".join(node if isinstance(node, str) else text(node[2]) for node in nodes)


def test_markdown_becomes_elements() -> None:
    found = render("# T\n\n**b** `c<d` [l](https://e.org)\n\n|a|b|\n|-|-|\n|1|2|\n\n```py\nx = 1\n```")
    names = [name for name, _ in tags(found)]
    assert {"h1", "strong", "code", "a", "table", "td", "pre"} <= set(names)
    assert "c<d" in text(found)
    assert ("a", {"href": "https://e.org"}) in tags(found)


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![i](http://evil.example/i.png)",
        "[l](javascript:alert(1))",
        "[l](  JaVaScRiPt:alert(1))",
        "[l](data:text/html,x)",
        "[l](//evil.example)",
        "<a href=javascript:alert(1)>l</a>",
        "<svg><script>1</script></svg>",
        "<math><mtext><style><img src=x onerror=alert(1)></style></mtext></math>",
        "&lt;script&gt;",
        "<details open ontoggle=alert(1)>",
        "`</code><script>alert(1)</script>`",
        "[l]: javascript:alert(1)\n\n[l]",
    ],
)
def test_no_other_element_or_attribute_gets_through(hostile: str) -> None:
    for name, attributes in tags(render(f"{hostile}\n\n> {hostile}\n\n- {hostile}")):
        assert name in TAGS
        assert set(attributes) <= {"href"}
        assert attributes.get("href", "https://").startswith(("http://", "https://", "mailto:"))


@pytest.mark.parametrize("piece", ["[", "*a ", "![[]()", "> ", "- ", "`", "<a", "|a"])
def test_what_takes_long_is_limited(piece: str) -> None:
    start = time.process_time()
    render((piece * MAX_CHARACTERS)[:MAX_CHARACTERS])
    assert time.process_time() - start < 60
    with pytest.raises(ApiError, match="up to 50000 characters"):
        render(piece * MAX_CHARACTERS + "x")
