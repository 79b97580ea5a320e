"""What the refusals of object stores mean, as errors of ours; and their answers, which are XML.

Codes are those of Amazon's S3 API reference, "Error responses"; other stores use them too, and some of their own. Of an
answer only the code is shown: its text may repeat what was sent, and that holds signatures.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from weightops.errors import (
    AuthenticationFailed,
    CorruptInput,
    NetworkFailed,
    NoRoom,
    OutputExists,
    SourceMissing,
    UploadGone,
    WeightopsError,
)
from weightops.stores.web.body import RETRIED
from weightops.stores.web.policy import Transient

_CODE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_TRANSIENT = ("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException")
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted")
_FULL = (
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
    "InsufficientStorage",
    "EntityTooLarge",
)
_STATUSES = {
    401: "AccessDenied",
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    507: "QuotaExceeded",
}
"""What a status means that comes without a code."""
_AGAIN = "run the same command again: it continues"
_KEYS = f"`aws sts get-caller-identity` says whose keys are used; get new ones, and {_AGAIN}"
_REFUSED = {
    "RequestTimeTooSkewed": ("refuses the clock of this machine", f"set the clock, and {_AGAIN}"),
    "ExpiredToken": ("says that the session token has expired", f"log in again, and {_AGAIN}"),
    "TokenRefreshRequired": ("says that the session token has expired", f"log in again, and {_AGAIN}"),
    "InvalidToken": ("does not accept the session token", _KEYS),
    "InvalidAccessKeyId": ("does not know the access key", _KEYS),
    "SignatureDoesNotMatch": ("does not accept the signature", "is the secret key the one of this access key?"),
    "AccessDenied": ("refuses access", "the keys need s3:GetObject and s3:ListBucket, and s3:PutObject to write"),
}


class Taken(OutputExists):
    """There is an object of that name, and the request was not to replace one."""


def parse_answer(data: bytes, shown: str) -> ET.Element:
    """An answer's XML, its names without namespaces; raises `CorruptInput` for what is none, or has entities."""
    if b"<!" in data:
        raise CorruptInput(f"{shown}: the store's answer declares entities, as none does")
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, ValueError, LookupError):
        raise CorruptInput(f"{shown}: the store's answer is no XML") from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def code_of(data: bytes) -> str:
    """The code in the XML of a refusal, if it is one."""
    try:
        root = parse_answer(data, "")
    except CorruptInput:
        return ""
    code = (root.findtext("Code") or "").strip() if root.tag == "Error" else ""
    return code if _CODE.fullmatch(code) else ""


def refusal(shown: str, server: str, status: int, code: str, wait_s: float = 0.0) -> WeightopsError:
    """The error for an answer: `shown` is what was asked for, of which `server`, `wait_s` its Retry-After.

    `Transient` does not say what was asked for: who tries again does.
    """
    code = code or _STATUSES.get(status, "")
    said = f"status {status}" + (f", {code}" if code else "")
    if code in _REFUSED:
        what, hint = _REFUSED[code]
        return AuthenticationFailed(f"{shown}: {server} {what} ({said})", hint=hint)
    if code == "NoSuchBucket":
        return SourceMissing(f"{shown}: {server} has no such bucket", hint="make the bucket first, or correct its name")
    if code == "NoSuchUpload":
        return UploadGone(f"{shown}: {server} does not know the upload any more")
    if code == "PreconditionFailed":
        return Taken(f"{shown} exists")
    if code in _FULL or status == 507:
        return NoRoom(f"{shown}: {server} is full ({said})", hint=f"make room, and {_AGAIN}")
    if status == 404:
        return SourceMissing(f"{shown}: no such object")
    if status in RETRIED or (status >= 500 and status != 501) or code in (*_TRANSIENT, *_CONFLICTS):
        return Transient(f"{server} answers with {said}", wait_s)
    if status in (401, 403):
        return AuthenticationFailed(f"{shown}: {server} refuses access ({said})", hint=_KEYS)
    return NetworkFailed(f"{shown}: {server} answers with {said}")
