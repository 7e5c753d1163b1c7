"""The names of the valid files in the folder of seeds, and what is asked of a bundle."""

PLAIN, ADAPTERS, ONNX = "plain", "adapters", "onnx"
"""Bundles: the base alone, in GGUF; with a LoRA, a prefix and a draft table; the LoRA and its base in ONNX."""
STATES, SESSION, KIT, PEFT, MODEL, RECIPE = "states", "session.kv", "kit.json", "peft", "model", "recipe.yaml"
LOG = "answers.jsonl"
LORA, PREFIX = "lora", "prefix"
QUESTION = "turn on the light"
