"""Access to the internals of a runtime, for measurements, tests and the server.

Not part of the public API: names and behavior may change in any version.

    context, active = loaded_bundle(runtime).context("command")
    with context.hold():
        logits = context.start(active, tokens).logits
"""

from __future__ import annotations

from pathlib import Path

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.engines.base import Engine, Logits
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.governor import Governor
from edgetune_runtime.serving.jobs import SharedResources
from edgetune_runtime.serving.pool import Pool
from edgetune_runtime.states.cache import StateCache
from edgetune_runtime.store.in_use import VersionsInUse
from edgetune_runtime.text.chat import Prompt

from .loaded import LoadedBundle
from .opening_options import OpeningOptions
from .runtime import Runtime


def loaded_bundle(runtime: Runtime) -> LoadedBundle:
    """The loaded bundle of a runtime, which closes it."""
    return runtime._loaded


def logits_after(runtime: Runtime, prompt: Prompt, adapter: str) -> Logits:
    """The logits after a prompt with an adapter, shape [vocab]."""
    call = loaded_bundle(runtime).call(prompt, adapter)
    with call.lease() as context:
        return context.run(call.job).logits.copy()


def runtime_around(engine: Engine, bundle: Path, manifest: Manifest, name: str) -> Runtime:
    """A runtime on an existing engine, called `name`, without a state cache; closing it closes the engine."""
    options = OpeningOptions(name, engine.context_length, engine.threads, verify=False)
    governor = Governor(engine.threads, adjusts=engine.adjusts_threads)
    # No state of any size fits in that cache.
    shared = SharedResources(manifest.base.fingerprint, 1, StateCache(0), governor)
    return Runtime(bundle, LoadedBundle(bundle, manifest, Pool(Context(engine, shared)), options, VersionsInUse()))
