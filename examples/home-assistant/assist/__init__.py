"""Home Assistant's prompts in short, and back: needs edgetune_runtime and PyYAML, no torch."""
