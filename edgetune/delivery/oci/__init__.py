"""Sends bundles to OCI registries and image layouts, and fetches them from there."""
