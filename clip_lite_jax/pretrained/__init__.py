"""Weights of other projects: read, written, and checked on the way."""
