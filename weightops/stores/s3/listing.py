"""What lies in a bucket below a prefix, by ListObjectsV2."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from urllib.parse import unquote

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.stores.s3.connection import S3
from weightops.stores.s3.places import BucketPlace, address
from weightops.stores.s3.refusals import parse_answer
from weightops.stores.web.policy import Transient

_MAX_OBJECTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Object:
    """An object by its key, with its size in bytes and its ETag without quotes."""

    key: str
    nbytes: int
    etag: str


def list_objects(
    connection: S3, bucket: str, prefix: str = "", *, delimiter: str = ""
) -> tuple[list[Object], list[str]]:
    """The objects whose keys begin with `prefix`, sorted; with `delimiter` those that have it nowhere after that.

    Of the others, the beginnings of their keys up to it are the second list. Keys that end in a slash, by which some
    programs mark folders, are left out. Raises as `S3` does, `CorruptInput` for listings without sense.
    """
    shown = str(BucketPlace(bucket, prefix.removesuffix("/")))
    query = {"list-type": "2", "encoding-type": "url", "prefix": prefix}
    if delimiter:
        query["delimiter"] = delimiter
    found: list[Object] = []
    folders: list[str] = []
    seen = {""}
    while True:
        root = connection.retried(shown, lambda: _page(connection, bucket, query, shown))
        is_coded = root.findtext("EncodingType") == "url"
        found += [_object(each, prefix, is_coded, shown) for each in root.iterfind("Contents")]
        folders += [_key(each.findtext("Prefix"), prefix, is_coded, shown) for each in root.iterfind("CommonPrefixes")]
        if len(found) > _MAX_OBJECTS:
            raise UsageError(f"{shown}: more than {_MAX_OBJECTS} objects", hint="name the folder that is meant")
        if root.findtext("IsTruncated") != "true":
            break
        following = root.findtext("NextContinuationToken") or ""
        if following in seen:
            raise CorruptInput(f"{shown}: the store's listing goes on in circles")
        seen.add(following)
        query["continuation-token"] = following
    return sorted((o for o in found if not o.key.endswith("/")), key=lambda o: o.key), sorted(folders)


def _page(connection: S3, bucket: str, query: dict[str, str], shown: str) -> ET.Element:
    root = parse_answer(connection.call("GET", address(bucket, ""), query).data, shown)
    if root.tag != "ListBucketResult":
        raise Transient("an answer without sense")
    return root


def _object(entry: ET.Element, prefix: str, is_coded: bool, shown: str) -> Object:
    key, size = _key(entry.findtext("Key"), prefix, is_coded, shown), entry.findtext("Size") or ""
    if not size.isdecimal() or len(size) > 18:
        raise CorruptInput(f"{shown}: the store lists {escape(key)} without a size")
    return Object(key, int(size), (entry.findtext("ETag") or "").strip().strip('"'))


def _key(text: str | None, prefix: str, is_coded: bool, shown: str) -> str:
    key = unquote(text or "") if is_coded else text or ""
    if not key.startswith(prefix):
        raise CorruptInput(f"{shown}: the store lists {escape(key)!r}, which does not begin so")
    return key
