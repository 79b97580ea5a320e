"""What went wrong with a request, in OpenAI's form and with the right status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from weightops.errors import (
    CorruptInput,
    IncompatibleInputs,
    Interrupted,
    NoRoom,
    SourceMissing,
    UsageError,
    WeightopsError,
)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}
_STATUS: tuple[tuple[type[WeightopsError], int], ...] = (
    (UsageError, 400),
    (IncompatibleInputs, 400),
    (NoRoom, 503),
    (Interrupted, 503),
    (SourceMissing, 500),
    (CorruptInput, 500),
)


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
    def of(cls, error: WeightopsError, *, param: str | None = None) -> ApiError:
        """The same of an error of ours: a wrong request is the client's fault, a bad checkpoint the server's."""
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        code = "context_length_exceeded" if type(error).__name__ == "PromptTooLong" else None
        return cls(status, f"{error}; {error.hint}" if error.hint else str(error), param=param, code=code)

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
