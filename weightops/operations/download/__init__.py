"""A repository, URL or list brought into a folder, and proven."""

from __future__ import annotations

from weightops.operations.download.into import download_into
from weightops.operations.download.into_bucket import download_into_bucket
from weightops.operations.download.into_cache import download_into_cache
from weightops.operations.download.operation import Download
from weightops.operations.download.report import DownloadDocument, download_json

__all__ = [
    "Download",
    "DownloadDocument",
    "download_into",
    "download_into_bucket",
    "download_into_cache",
    "download_json",
]
