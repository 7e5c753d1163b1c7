"""All that is known about writing GGUF, for llama.cpp."""

from edgetune_export.backends.format import Format

FORMAT = Format(packages=("llama-cpp-python",), links_base=True)
