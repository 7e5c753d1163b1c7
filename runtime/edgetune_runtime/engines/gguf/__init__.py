"""The engine of GGUF files, on llama.cpp."""
