"""Uploads to a key that have not ended, whoever began them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from weightops.errors import SourceMissing, UploadGone
from weightops.stores.s3.connection import S3
from weightops.stores.s3.places import address
from weightops.stores.s3.refusals import parse_answer
from weightops.stores.web.urls import show


def abort_uploads(connection: S3, bucket: str, key: str) -> None:
    """Abort all uploads to this very key. Raises as `S3` does."""
    url = address(bucket, key)
    for number in _uploads(connection, bucket, key):
        with suppress(UploadGone, SourceMissing):
            connection.retried(show(url), partial(connection.call, "DELETE", url, {"uploadId": number}))


def _uploads(connection: S3, bucket: str, key: str) -> list[str]:
    """The names of uploads to a key: it is the prefix that is asked for, as some servers know no other."""
    shown = show(address(bucket, key))
    ask = partial(connection.call, "GET", address(bucket, ""), {"uploads": "", "prefix": key})
    root = parse_answer(connection.retried(shown, ask).data, shown)
    own = (each.findtext("UploadId") or "" for each in root.iterfind("Upload") if each.findtext("Key") == key)
    return [number for number in own if number]
