"""The engine for GGUF files, on llama.cpp."""

from edgetune_runtime.bundle import GENERATION

ENGINES = {GENERATION: "engine"}
