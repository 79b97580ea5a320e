"""Buckets of object stores that speak S3: signed requests, listings, and objects that are written part by part."""
