"""Contexts on one loaded base, shared among callers."""
