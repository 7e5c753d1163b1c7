"""Builds, scores and asks an adapter, cell by cell; `tools/notebook.py` writes the same cells to notebook.ipynb."""

# %% [markdown]
# # An adapter in a notebook
# It turns sentences into commands. The cells train it, score it and ask it; stop a cell, and it resumes when it runs
# again.

# %%
import random

import edgetune

base = "smollm2-135m"
actions = {"on": "turn_on", "off": "turn_off"}
rows = [
    {
        "prompt": f"turn {state} the {device} in the {room}",
        "completion": {"service": f"{device}.{action}", "area": room},
    }
    for state, action in actions.items()
    for device in ("light", "fan", "radio", "heater")
    for room in ("hall", "kitchen", "attic", "study", "bedroom", "cellar", "porch", "garage")
]
random.Random(0).shuffle(rows)
training = {"epochs": 3, "batch_size": 4, "evals": 3}
adapters = {"command": {"data": {"train": rows[:48]}, "output": "auto"}}
recipe = edgetune.Recipe.from_dict({"name": "notebook", "base": base, "training": training, "adapters": adapters})

# %%
build = edgetune.build(recipe, "build/notebook")
build.figures["command"]["val_loss"], build.losses["command"]

# %%
edgetune.evaluate(build.bundle, rows[48:], "command")

# %%
with build.open() as runtime:
    print(runtime.generate("turn off the radio in the attic", adapter="command").text)
