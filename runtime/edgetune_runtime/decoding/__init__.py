"""Constrained decoding: what an answer may be, and which tokens may come next."""
