"""Runs a bundle: base mapped once, adapters switched by pointer. No torch."""
