"""Every error that weightops raises on purpose.

    WeightopsError            1    something went wrong; the message says what
    ├── IncompatibleInputs    1    the inputs do not belong together (wrong base, names, shapes)
    ├── NetworkFailed         1    a server could not be reached, or failed for longer than we keep trying
    ├── UsageError            2    the request itself makes no sense
    │   └── PromptTooLong     2    a prompt and what is to follow have more tokens than a model has positions
    ├── Differs               3    checked, and it differs
    ├── SourceMissing        10    an input is not there
    │   └── NoWeights        10    a folder is there, but holds no weights
    ├── OutputExists         11    the output is there already
    ├── PlanDiffers          12    a partial output was made by another plan
    ├── CorruptInput         13    an input is malformed, truncated, changed under us or hostile
    ├── AuthenticationFailed 14    the server wants another token
    ├── UploadGone            1    what was uploaded has been given up by another process
    ├── Unfinished            1    groups of a job are still to be done
    ├── Locked               15    another run holds the output
    │   └── Claimed          15    a job of many processes holds it
    ├── NoRoom               16    not enough disk or memory
    └── Interrupted     130/143    SIGINT or SIGTERM; the same command again continues

The message is one sentence that names file, tensor, expected and found; `hint` says what to do next.
The numbers are the exit codes of the command line, and part of its interface.
"""

from __future__ import annotations

from typing import Any


class WeightopsError(Exception):
    """The root: catch this to catch everything that weightops reports."""

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole in other processes too, whatever arguments a subclass is made of."""
        return _remade, (type(self), self.args, vars(self))


def _remade(kind: type[WeightopsError], arguments: tuple[Any, ...], state: dict[str, Any]) -> WeightopsError:
    error = kind.__new__(kind, *arguments)
    vars(error).update(state)
    return error


class IncompatibleInputs(WeightopsError):
    """The inputs are well-formed but do not belong together."""


class NetworkFailed(WeightopsError):
    """A server or the way to it failed; what has arrived is kept."""


class UsageError(WeightopsError):
    """The request cannot be meant as it stands."""

    exit_code = 2


class PromptTooLong(UsageError):
    """A prompt and the tokens that are to follow it are more than a model has positions."""


class Differs(WeightopsError):
    """A check ran to its end and the answer is no."""

    exit_code = 3


class SourceMissing(WeightopsError):
    """An input file or folder does not exist."""

    exit_code = 10


class NoWeights(SourceMissing):
    """A folder exists but holds no weights."""


class OutputExists(WeightopsError):
    """The output exists and nobody asked to replace it."""

    exit_code = 11


class PlanDiffers(WeightopsError):
    """A partial output exists, and another plan made it."""

    exit_code = 12


class CorruptInput(WeightopsError):
    """An input is malformed, truncated, inconsistent with itself, or hostile."""

    exit_code = 13


class AuthenticationFailed(WeightopsError):
    """A server refused the credentials."""

    exit_code = 14


class Locked(WeightopsError):
    """Another process is writing this output."""

    exit_code = 15


class Claimed(Locked):
    """This output belongs to a job of many processes."""


class UploadGone(WeightopsError):
    """The store does not know an upload: it was ended or aborted, which another process may have done."""


class Unfinished(WeightopsError):
    """Groups of a job, by their numbers, are still to be done."""

    def __init__(self, message: str, groups: tuple[int, ...], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.groups = groups


class NoRoom(WeightopsError):
    """Disk or memory would not suffice, or did not."""

    exit_code = 16


class Interrupted(WeightopsError):
    """SIGINT or SIGTERM asked for a stop; what was committed stays."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted", hint="run the same command again to continue")
        self.exit_code = 128 + signal_number
