"""Chat templates, sampling, and streaming text from tokens."""
