"""What an operation has made, held before a byte is written against what transformers makes of its config.json."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from weightops.checkpoint import Checkpoint
from weightops.engine.examine import unread
from weightops.errors import IncompatibleInputs, WeightopsError
from weightops.io.escape import escape
from weightops.operations.check.architecture import Held, architecture_findings, held_against
from weightops.operations.check.config import config_findings, tie_findings
from weightops.operations.check.report import Finding

_FATAL = ("missing", "unexpected", "config-shape", "config-layers", "config", "tie")


def held_to_class(result: Checkpoint, source: Checkpoint | None = None) -> Checkpoint:
    """`result`, which its config.json's class in transformers has been found to load with no key missing or left over.

    Keys that the class itself passes over do not count, nor does what was so in `source` already. Where nothing says
    what the model should have, a warning says that, and why. No value is read; importing transformers takes seconds,
    which LLaMA and Mistral are spared. Raises `IncompatibleInputs` naming the tensor.
    """
    held = held_against(result, result.config(), None, wanted=True)
    if held.by is None and not held.is_beyond_files:
        note = f"names and shapes of the result were held against no model of transformers: {held.reason}"
        return result.warned(note)
    found = list(_fatal(result, held))
    known = _known(source) if found and source is not None else set()
    fresh = next((finding for finding in found if (finding.code, finding.subject) not in known), None)
    if fresh is not None:
        hint = "nothing was written: transformers would make up what is missing, and leave out what is too many"
        raise IncompatibleInputs(f"{escape(result.name)}: the result would not load: {fresh.message}", hint=hint)
    return result


def _known(source: Checkpoint) -> set[tuple[str, str]]:
    """What is the matter with the source already."""
    try:
        held = held_against(source, source.config(), None, wanted=True)
        return {(finding.code, finding.subject) for finding in _fatal(source, held)}
    except WeightopsError:
        return set()


def _fatal(checkpoint: Checkpoint, held: Held) -> Iterator[Finding]:
    config = checkpoint.config()
    if held.is_beyond_files:
        yield Finding("error", "config-layers", "config.json", held.reason)
        return
    if held.architecture is not None:
        findings = architecture_findings(checkpoint, config, held.architecture)
    else:
        findings = chain(
            config_findings(checkpoint, config), tie_findings(checkpoint, config, unread(checkpoint), missing=True)
        )
    yield from (finding for finding in findings if finding.code in _FATAL and finding.severity != "note")
