"""Publishing: what was verified here goes to a hub or into a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.api.outputs import local
from weightops.api.prove import check
from weightops.engine.control import Control
from weightops.errors import NoWeights, UsageError
from weightops.formats.proofs.manifest import Manifest
from weightops.recipes.planning import StrPath

if TYPE_CHECKING:
    from weightops.operations.publish import Publication


def publish(
    folder: StrPath,
    place: str,
    *,
    create: bool = False,
    public: bool = False,
    delete: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    control: Control | None = None,
) -> Publication:
    """Let the files of a folder's manifest, its card and its signature be at `hf://org/name`, in one commit.

    First they are held against the manifest, and what `check` finds broken is refused. See
    `weightops.operations.publish`; the control's `stores` know hub, token and proxies.
    """
    from weightops.operations.publish import publish as operation

    control = control or Control()
    return operation(
        local(folder),
        place,
        create=create,
        public=public,
        delete=delete,
        message=message,
        dry_run=dry_run,
        broken=lambda path: _broken(path, workers, control),
        make_card=_card,
        workers=workers,
        control=control,
    )


def _broken(folder: Path, workers: int | None, control: Control) -> Sequence[str]:
    """The errors that `check` finds; a folder without weights, or with weights that are not read here, has none."""
    try:
        report = check(folder, workers=workers, control=control)
    except (NoWeights, UsageError):
        return ()
    return [finding.message for finding in report.findings if finding.severity == "error"]


def _card(manifest: Manifest, title: str, place: str) -> bytes:
    from weightops.recipes.card import card_of  # imported here because few runs write one

    return card_of(manifest, title, place)
