"""Access to the internals of a runtime, for measurements and tests: contexts, prepared calls, engines, saved states.

Not part of the public API: names and behavior may change in any version.

    context, active = loaded_bundle(runtime).context("command")
    with context.hold():
        logits = context.start(active, tokens).logits
"""

from __future__ import annotations

from .loaded import LoadedBundle
from .runtime import Runtime


def loaded_bundle(runtime: Runtime) -> LoadedBundle:
    """The loaded bundle of a runtime, which closes it."""
    return runtime._loaded
