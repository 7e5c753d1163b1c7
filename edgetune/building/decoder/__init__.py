"""Decoders: bases that generate text."""
