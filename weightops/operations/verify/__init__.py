"""A folder or file, here or in a bucket, held against a manifest or a checksum list."""

from __future__ import annotations

from weightops.operations.verify.bucket import verify_bucket
from weightops.operations.verify.operation import EXTRA_POLICIES, is_listing, verify
from weightops.operations.verify.report import FileResult, VerifyDocument, VerifyReport, junit_of_error
from weightops.operations.verify.signed import verify_signature

__all__ = [
    "EXTRA_POLICIES",
    "FileResult",
    "VerifyDocument",
    "VerifyReport",
    "is_listing",
    "junit_of_error",
    "verify",
    "verify_bucket",
    "verify_signature",
]
