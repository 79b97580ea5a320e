"""Fetching files whole: chunks, claims and digests, so that what is there is never fetched twice."""
