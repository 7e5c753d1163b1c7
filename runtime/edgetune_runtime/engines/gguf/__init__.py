"""The engine for GGUF files, on llama.cpp."""

from edgetune_runtime.bundle import GENERATION

ENGINES = {GENERATION: "engine"}
NAME = __name__.rpartition(".")[2]
"""Name of the engine and its format, which is that of the folder: in a manifest, and as `engine` of `Runtime.open`."""
KV_TYPES: tuple[str, ...] = ("f16", "q8_0")
"""Data types that keys and values can have, the default first."""
