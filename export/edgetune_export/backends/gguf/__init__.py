"""Writes GGUF files for llama.cpp."""

from edgetune_export.backends.format import Format

FORMAT = Format(packages=("llama-cpp-python",), links_base=True)
