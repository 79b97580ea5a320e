"""Markdown as a tree of plain elements, which a page builds one by one: no HTML of a model's ever reaches it.

markdown-it-py takes CommonMark with tables and lets no HTML through, nh3 keeps what is on a list, and what is left
becomes nodes. Some texts take seconds (thousands of brackets), so text is limited and rendered one at a
time, in a thread of its own; see `weightops.serve.app`.
"""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import nh3
from markdown_it import MarkdownIt

from weightops.serve.errors import ApiError

MAX_CHARACTERS = 50_000
_MAX_DEPTH = 40
TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "em", "strong", "s", "code", "pre", "blockquote", "ul"),
    *("ol", "li", "table", "thead", "tbody", "tr", "th", "td", "a"),
}
_LINKS = ("http://", "https://", "mailto:")
"""What leads out of the page for certain; a link without a scheme would lead into this server."""
_VOID = {"br", "hr"}
Node = str | list[Any]
"""Text, or a tag, its attributes and the nodes in it."""


def render(text: str) -> list[Node]:
    """The nodes of a text in Markdown; raises `ApiError` for one that is too long."""
    if len(text) > MAX_CHARACTERS:
        raise ApiError(413, f"text of up to {MAX_CHARACTERS} characters is rendered", code="request_too_large")
    html = MarkdownIt("commonmark", {"html": False, "maxNesting": 20}).enable("table").render(text)
    # Links are the one attribute that is left, and lead out of the page with nothing to tell where from.
    clean = nh3.clean(html, tags=TAGS, attributes={"a": {"href"}}, url_schemes={"http", "https", "mailto"})
    return _Tree.of(clean)


class _Tree(HTMLParser):
    """Builds nodes; whatever is not on the list is gone already."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.nodes: list[Node] = []
        self._open: list[list[Node]] = [self.nodes]

    @classmethod
    def of(cls, html: str) -> list[Node]:
        tree = cls()
        tree.feed(html)
        tree.close()
        return tree.nodes

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside: list[Node] = []
        if len(self._open) < _MAX_DEPTH:
            kept = {n: v for n, v in attrs if (tag, n) == ("a", "href") and v and v.lower().startswith(_LINKS)}
            self._open[-1].append([tag, kept, inside])
        if tag not in _VOID:
            self._open.append(inside)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID and len(self._open) > 1:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].append(data)
