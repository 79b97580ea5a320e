"""What mkdocs does not do by itself: README and CHANGELOG are pages, and all pages are texts for assistants.

`llms.txt` lists the pages, each with a sentence, as https://llmstxt.org has it; `llms-full.txt` is all of them in one.
Both, and the pages as Markdown, lie beside the HTML.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = "https://github.com/weightops/weightops/blob/main"
ELSEWHERE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Pages whose Markdown lies outside this folder, by the names that they have in the site."""
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
_SENTENCE = re.compile(r".*?[.?!](?=\s|$)|.*")


def pages() -> dict[str, str]:
    """The site's pages as Markdown, by their names in the site."""
    found = {path.relative_to(ROOT).as_posix(): path.name for path in sorted((ROOT / "docs").glob("*.md"))} | ELSEWHERE
    return {name: moved((ROOT / path).read_text(encoding="utf-8"), path) for path, name in found.items()}


def moved(text: str, path: str) -> str:
    """The text of a file of the repository with its links as they are in the site; to other files, on GitHub."""

    def link(matched: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), matched[2]))
        if target in ELSEWHERE:
            target = ELSEWHERE[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            target = f"{SOURCE}/{target}"
        return f"{matched[1]}{target}{matched[3]}"

    return _LINK.sub(link, text)


def summary(text: str) -> str:
    """The first sentence of a page, without marks."""
    paragraphs = text.split("\n\n")
    first = next(each for each in paragraphs if each.strip() and not each.startswith(("#", "![", "<!--", "|", "```")))
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(first.split())).replace("*", "")
    matched = _SENTENCE.match(plain)
    return matched[0].rstrip(":") if matched else plain


def sections(nav: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Pages as mkdocs.yml lists them: title and name, by section."""
    found: dict[str, list[tuple[str, str]]] = {}
    for entry in nav:
        for title, content in entry.items():
            if isinstance(content, str):
                found.setdefault("", []).append((title, content))
            else:
                found[title] = [pair for each in content for pair in each.items()]
    return found


def index(nav: Iterable[Mapping[str, Any]], texts: Mapping[str, str]) -> str:
    """llms.txt."""
    lines = ["# weightops", "", f"> {summary(texts['index.md'])}"]
    for section, entries in sections(nav).items():
        lines += ["", f"## {section or 'Overview'}", ""]
        lines += [f"- [{title}]({name}): {summary(texts[name])}" for title, name in entries]
    return "\n".join([*lines, ""])


def everything(nav: Iterable[Mapping[str, Any]], texts: Mapping[str, str]) -> str:
    """llms-full.txt: the pages in the order of the navigation, each under its name."""
    names = [name for entries in sections(nav).values() for _, name in entries]
    return "\n".join(f"<!-- {name} -->\n\n{texts[name].strip()}\n" for name in names)


def on_files(files: Any, *, config: Any) -> Any:
    """mkdocs: the pages that lie elsewhere."""
    from mkdocs.structure.files import File

    texts = pages()
    for name in ELSEWHERE.values():
        files.append(File.generated(config, name, content=texts[name]))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs: links that lead out of this folder."""
    return markdown if page.file.src_uri in ELSEWHERE.values() else moved(markdown, f"docs/{page.file.src_uri}")


def on_post_build(*, config: Any) -> None:
    """mkdocs: the texts for assistants."""
    texts, site = pages(), Path(config.site_dir)
    texts |= {"llms.txt": index(config.nav, texts), "llms-full.txt": everything(config.nav, texts)}
    for name, text in texts.items():
        (site / name).write_text(text, encoding="utf-8")
