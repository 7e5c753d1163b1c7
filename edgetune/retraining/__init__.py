"""Trains the adapters of a bundle again, on corrections or on another base, and compares both versions."""
