"""Saved KV cache states, in memory and on disk."""
