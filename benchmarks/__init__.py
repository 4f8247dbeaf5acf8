"""Measurements against named peers; run from the root of a checkout."""
