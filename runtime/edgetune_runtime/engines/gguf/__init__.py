"""The engine for GGUF files, on llama.cpp."""

from edgetune_runtime.bundle import GENERATION

ENGINES = {GENERATION: "engine"}
NAME = __name__.rpartition(".")[2]
"""Name of the engine and its format, which is that of the folder: in a manifest, and as `engine` of `Runtime.open`."""
