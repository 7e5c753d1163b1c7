"""Writes GGUF files for llama.cpp."""

from edgetune_export.backends.format import Format

FORMAT = Format(links_base=True)
