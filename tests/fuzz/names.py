"""The names of the valid files in the folder of seeds, and what is asked of a bundle."""

PLAIN, ADAPTERS, ONNX = "plain", "adapters", "onnx"
"""Bundles: the base alone, in GGUF; with a LoRA, a prefix and a draft table; the LoRA and its base in ONNX."""
OTHER_BASES = ("gemma4", "qwen35")
"""Architectures with hyperparameters of their own, in a bundle each, whose name it is."""
STATES, SESSION, KIT, PEFT, MODEL, RECIPE = "states", "session.kv", "kit.json", "peft", "model", "recipe.yaml"
LOG = "answers.jsonl"
REPOSITORY, KEYS, SIGNED, DEVICE = "repository", "keys", "signed", "device"
"""A repository, its keys, its bundle, and the prefix of a device that has looked at it."""
LAYOUT, RELEASED, REPORT, RUN = "layout", "released", f"reports/{'ab' * 16}.json", "run.json"
"""OCI image layouts with the signed bundle, the second with its release, and reports of a device and a server's run."""
LORA, PREFIX = "lora", "prefix"
QUESTION = "turn on the light"
