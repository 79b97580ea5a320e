"""What verify found, as a value, as JSON and as JUnit XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from weightops.io.brief import brief
from weightops.io.notebook import card, in_units
from weightops.io.strict_json import as_json

Status = Literal["ok", "differs", "missing", "extra", "unreadable"]
STATUSES: tuple[Status, ...] = ("ok", "differs", "missing", "extra", "unreadable")
Mode = Literal["full", "quick", "content"]

_NOT_IN_XML = re.compile("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file: `expected` and `found` are digests or sizes in words, `detail` says what else is wrong."""

    name: str
    status: Status
    expected: str = ""
    found: str = ""
    detail: str = ""


class VerifyDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-verify/1"):
    """What `verify --json` prints: a `VerifyReport` as it stands. `bytes` were read in `elapsed_s` seconds."""

    folder: str
    manifest: str
    mode: Mode
    verdict: bool
    counts: dict[Status, int]
    bytes: int
    elapsed_s: float
    files: tuple[FileResult, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    content_equal: bool | None
    tensors_differ: tuple[str, ...]
    tensors_missing: tuple[str, ...]
    tensors_extra: tuple[str, ...]
    signer: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The outcome of one verification.

    `mode`: full reads every file, quick looks at sizes and structure, content reads tensors only.
    `nbytes` were read in `elapsed_s` seconds, retries by tensor included.
    `problems` are faults of the folder as a whole: of its headers or index, or why its tensors cannot be read;
    `warnings` change nothing about the verdict.
    `content_equal` is None when the tensors were not compared, `signer` when the list is no signature; else it says who
    has signed it.
    """

    folder: str
    manifest: str
    mode: Mode
    extra: str
    files: tuple[FileResult, ...] = ()
    problems: tuple[str, ...] = ()
    tensors_differ: tuple[str, ...] = ()
    tensors_missing: tuple[str, ...] = ()
    tensors_extra: tuple[str, ...] = ()
    content_equal: bool | None = None
    nbytes: int = 0
    elapsed_s: float = 0.0
    warnings: tuple[str, ...] = ()
    signer: str | None = None

    __repr__ = brief

    def _repr_html_(self) -> str:
        wrong = [(file.name, file.status, file.detail or file.found) for file in self.files if file.status != "ok"]
        rows = [*(("the folder", "wrong", problem) for problem in self.problems), *wrong]
        facts = {"held against": self.manifest, "files": len(self.files), "read": in_units(self.nbytes)}
        title = f"{self.folder}: {'as listed' if self.verdict else 'differs'}"
        return card(title, facts, ("file", "", "why"), rows, what="files")

    @property
    def verdict(self) -> bool:
        """Whether the folder is as the manifest says; extra files count only under `extra="fail"`."""
        if self.mode == "content":
            return self.content_equal is True
        allowed = ("ok",) if self.extra == "fail" else ("ok", "extra")
        return not self.problems and all(file.status in allowed for file in self.files)

    @property
    def counts(self) -> dict[Status, int]:
        """The number of files of each status."""
        counted = Counter(file.status for file in self.files)
        return {status: counted[status] for status in STATUSES}

    def to_json(self) -> dict[str, Any]:
        """A document of schema `weightops-verify/1`."""
        document = VerifyDocument(
            folder=self.folder,
            manifest=self.manifest,
            mode=self.mode,
            verdict=self.verdict,
            counts=self.counts,
            bytes=self.nbytes,
            elapsed_s=round(self.elapsed_s, 3),
            files=self.files,
            problems=self.problems,
            warnings=self.warnings,
            content_equal=self.content_equal,
            tensors_differ=self.tensors_differ,
            tensors_missing=self.tensors_missing,
            tensors_extra=self.tensors_extra,
            signer=self.signer,
        )
        return as_json(document)

    def to_junit(self) -> bytes:
        """JUnit XML: a test case per file, and one each for structure and content where those were looked at.

        Differing and missing files are failures, unreadable ones errors, tolerated extra files are skipped.
        Characters that XML cannot hold, and all controls, appear as escapes.
        """
        suite = ET.Element("testsuite", name="weightops verify")
        for file in self.files:
            self._add_file(suite, file)
        if self.problems or self.mode == "quick":
            _add_case(suite, "structure", "failure" if self.problems else None, "; ".join(self.problems))
        if self.content_equal is not None:
            kinds = {"differ": self.tensors_differ, "missing": self.tensors_missing, "extra": self.tensors_extra}
            text = "; ".join(f"tensors {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
            _add_case(suite, "content", None if self.content_equal else "failure", text)
        return _document(suite, self.elapsed_s)

    def _add_file(self, suite: ET.Element, file: FileResult) -> None:
        tags = {"ok": None, "unreadable": "error", "extra": "failure" if self.extra == "fail" else "skipped"}
        words = [f"expected {file.expected}"] if file.expected else []
        words += [f"found {file.found}"] if file.found else []
        words += [file.detail] if file.detail else []
        message = f"{file.status}: {', '.join(words)}" if words else file.status
        _add_case(suite, file.name, tags.get(file.status, "failure"), message)


def junit_of_error(folder: str, message: str) -> bytes:
    """JUnit XML of a verification that could not be done: one test case, which is an error."""
    suite = ET.Element("testsuite", name="weightops verify")
    _add_case(suite, folder, "error", message)
    return _document(suite, 0.0)


def _document(suite: ET.Element, elapsed_s: float) -> bytes:
    suite.set("tests", str(len(suite)))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("time", f"{elapsed_s:.3f}")
    root = ET.Element("testsuites")
    root.append(suite)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def _add_case(suite: ET.Element, name: str, tag: str | None, message: str) -> None:
    case = ET.SubElement(suite, "testcase", classname="weightops.verify", name=_for_xml(name))
    if tag is not None:
        ET.SubElement(case, tag, message=_for_xml(message))


def _for_xml(text: str) -> str:
    return _NOT_IN_XML.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
