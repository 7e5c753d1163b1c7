"""All that is known about writing GGUF."""
