"""Methods of one's own, from a Python file that is named on the command line: the only code of others that is run."""

from __future__ import annotations

import hashlib
import types
from dataclasses import replace
from pathlib import Path

from weightops.errors import SourceMissing, UsageError
from weightops.io.escape import escape
from weightops.ops.merging.method import Method
from weightops.ops.merging.methods import METHODS


def load_plugin(path: Path) -> str:
    """Run a Python file and add the methods in its `METHODS`, a list of `Method`; the SHA-256 of the file.

    Raises `SourceMissing` and `UsageError`, also for names that there are already.
    """
    shown = escape(str(path))
    try:
        code = path.read_bytes()
    except FileNotFoundError:
        raise SourceMissing(f"{shown}: no such file") from None
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read ({escape(str(error))})") from None
    digest = hashlib.sha256(code).hexdigest()
    module = types.ModuleType("weightops_plugin")
    try:
        exec(compile(code, str(path), "exec"), vars(module))
    except Exception as error:
        raise UsageError(f"{shown}: {type(error).__name__}: {escape(str(error))}") from error
    found = vars(module).get("METHODS")
    if not isinstance(found, list | tuple) or not found or not all(isinstance(each, Method) for each in found):
        raise UsageError(
            f"{shown}: has no METHODS, a list of weightops.ops.merging.method.Method", hint="docs/merge.md has one"
        )
    for method in found:
        known = METHODS.get(method.name)
        if known is not None and known.plugin is None:
            raise UsageError(f"{shown}: there is a method {escape(method.name)} already", hint="give it another name")
        METHODS[method.name] = replace(method, plugin=digest)
    return digest
