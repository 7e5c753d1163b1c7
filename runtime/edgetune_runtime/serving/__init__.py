"""Contexts of a loaded base, shared among callers."""
