"""`s3://bucket/prefix`: how a place in a bucket is written down, by people and in plans."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.io.paths import check_relative

SCHEME = "s3://"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", re.ASCII)
_PLAIN = "".join(c for c in map(chr, range(0x20, 0x7F)) if c not in "%?#")
"""What stands for itself in an address: all that is printable, but for what means something in a URL."""


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """A bucket, and the key of an object in it or the folder, without slashes at its ends, that keys begin with."""

    bucket: str
    key: str = ""
    is_folder: bool = False

    def __str__(self) -> str:
        return escape(f"{SCHEME}{self.bucket}" + (f"/{self.key}" if self.key else ""))


def is_bucket(text: str) -> bool:
    """Whether `text` names something in a bucket."""
    return text.startswith(SCHEME)


def parse_place(text: str) -> BucketPlace:
    """What `s3://bucket/prefix` means; certainly a folder if it ends in a slash, or is the bucket itself.

    Raises `UsageError` for what is no such place. A text with a question mark or an at sign before the first slash is
    not shown: what follows, or stands before, may be a secret.
    """
    bucket, _, key = text.removeprefix(SCHEME).partition("/")
    hint = "as in s3://bucket/prefix; keys come from the environment or ~/.aws"
    if "@" in bucket or "?" in text or "#" in text:
        raise UsageError("an address in a bucket with a user name, a query or a fragment is not used", hint=hint)
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{escape(text)}: {escape(bucket)!r} is no bucket", hint=hint)
    is_folder = not key or key.endswith("/")
    key = key.removesuffix("/")
    if key:
        try:
            check_relative(key, escape(text))
        except CorruptInput as error:
            raise UsageError(str(error), hint=hint) from None
    return BucketPlace(bucket, key, is_folder)


def address(bucket: str, key: str) -> str:
    """Where an object is, as plans record it; see `located`."""
    return f"{SCHEME}{bucket}/{quote(key, safe=_PLAIN)}"


def located(address: str) -> tuple[str, str]:
    """Bucket and key of an address that `address` made."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    return bucket, unquote(key)
