"""Trained adapters in, checked and packed files out."""
