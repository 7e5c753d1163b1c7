"""Trains the adapters of a bundle again on another base, and packs them if they got no worse."""
