"""Chat templates, sampling, and tokens as text."""
