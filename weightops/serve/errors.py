"""What went wrong with a request, in OpenAI's form and with the right status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from weightops.errors import IncompatibleInputs, WeightopsError
from weightops.inference.events import Failed, failed

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}
_STATUS = {2: 400, 16: 503, 130: 503, 143: 503}
"""HTTP's status by the exit code that the command line has for an error; 500 for the others."""


class ApiError(Exception):
    """A refusal: HTTP status, sentence, and what OpenAI's clients look at: the parameter at fault, and a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: WeightopsError | Failed) -> ApiError:
        """The same of an error of ours, raised or told as a text's last event.

        A wrong request is the client's fault, a bad checkpoint the server's.
        """
        event = error if isinstance(error, Failed) else failed(error)
        status = 400 if event.error == IncompatibleInputs.__name__ else _STATUS.get(event.code, 500)
        code = "context_length_exceeded" if event.error == "PromptTooLong" else None
        return cls(status, f"{event.message}; {event.hint}" if event.hint else event.message, code=code)

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the document."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def document(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unknown_path(path: str, method: str, *, is_known: bool) -> ApiError:
    """There is no such path, or it does not take this method."""
    if is_known:
        return ApiError(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} does not take {method}", code="method_not_allowed")
    return ApiError(HTTPStatus.NOT_FOUND, f"there is no {path} here", code="not_found")
