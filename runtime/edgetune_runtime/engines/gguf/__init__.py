"""The engine for GGUF files, on llama.cpp."""
