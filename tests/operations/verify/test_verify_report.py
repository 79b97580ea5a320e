from __future__ import annotations

import json
import xml.etree.ElementTree as ET

from weightops.operations.verify.report import FileResult, VerifyReport

HOSTILE = VerifyReport(
    folder="m",
    manifest="m.md5",
    mode="full",
    extra="warn",
    files=(
        FileResult('<a href="x">&\x00\x1b[31m\n\ud800\u202e', "differs", "md5 1", "md5 2"),
        FileResult("ok", "ok", "1", "1"),
        FileResult("gone", "missing", "md5 1"),
        FileResult("pipe", "unreadable", detail="not a regular file"),
        FileResult("more", "extra", detail="not listed"),
    ),
    problems=("the index lacks 'x'",),
    tensors_differ=("w\x07",),
    content_equal=False,
    elapsed_s=1.5,
)


def test_junit() -> None:
    document = HOSTILE.to_junit()
    assert not set(document) & {*range(9), 11, 12, *range(14, 32)}
    suite = ET.fromstring(document).find("testsuite")
    assert suite is not None
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "7",
        "failures": "4",
        "errors": "1",
        "skipped": "1",
        "time": "1.500",
    }
    cases = {case.get("name"): {child.tag: child.get("message") for child in case} for case in suite}
    assert cases == {
        '<a href="x">&\\x00\\x1b[31m\\n\\ud800\u202e': {"failure": "differs: expected md5 1, found md5 2"},
        "ok": {},
        "gone": {"failure": "missing: expected md5 1"},
        "pipe": {"error": "unreadable: not a regular file"},
        "more": {"skipped": "extra: not listed"},
        "structure": {"failure": "the index lacks 'x'"},
        "content": {"failure": "tensors differ: w\\x07"},
    }


def test_json() -> None:
    document = HOSTILE.to_json()
    assert (document["schema"], document["verdict"], document["bytes"]) == ("weightops-verify/1", False, 0)
    assert document["counts"] == {"ok": 1, "differs": 1, "missing": 1, "extra": 1, "unreadable": 1}
    assert document["files"][2] == {
        "name": "gone",
        "status": "missing",
        "expected": "md5 1",
        "found": "",
        "detail": "",
    }
    assert json.loads(json.dumps(document)) == document
