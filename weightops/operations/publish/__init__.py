"""Publish a folder that is as its manifest says: to a repository of a hub, or to a bucket."""

from __future__ import annotations

from weightops.operations.publish.operation import publish
from weightops.operations.publish.report import Publication, PublishDocument, PublishedFile

__all__ = ["Publication", "PublishDocument", "PublishedFile", "publish"]
