"""Encoders: bases for text classification, with a head per adapter."""
