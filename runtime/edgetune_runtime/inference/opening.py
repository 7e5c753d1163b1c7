"""Opens a bundle: checks its files, loads the base within the free memory, and opens the stores of its states."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from edgetune_runtime import engines
from edgetune_runtime.bundle import (
    STATES_FOLDER,
    Manifest,
    digest_of_model,
    files_beside,
    resolve,
    unchanged,
    verify_files,
)
from edgetune_runtime.decoding.past_answers import PastAnswers, path_of
from edgetune_runtime.engines.base import Engine, EngineClass
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, MissingLibraryError, UsageError, VerificationError
from edgetune_runtime.serving.classifier import Classifier
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.governor import Governor
from edgetune_runtime.serving.jobs import SharedResources
from edgetune_runtime.serving.places import Places
from edgetune_runtime.serving.pool import Pool
from edgetune_runtime.states.cache import StateCache
from edgetune_runtime.states.prompts import PromptStates
from edgetune_runtime.states.store import StateStore, default_folder
from edgetune_runtime.threads.machine import free_mb
from edgetune_runtime.threads.priority import ComputeThreads, compute_threads

from .opening_options import DISK, OFF, OpeningOptions, context_mb

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3

_MAX_CONTEXTS = 4
_SHARE_OF_FREE = 0.25
"""Share of the free memory that additional contexts may use."""


def require_library(manifest: Manifest, engine: str) -> None:
    """Load the library of an engine; MissingLibraryError also names another engine with which the bundle opens here."""
    try:
        engines.load(engine, manifest.task).library_version()
    except MissingLibraryError as error:
        other = next((name for name in manifest.base.files if _has_library(name, manifest.task)), None)
        if other is None:
            raise
        raise MissingLibraryError(error.message, f"{error.remedy}, or use engine {other}") from error


def _has_library(engine: str, task: str) -> bool:
    try:
        engines.load(engine, task).library_version()
    except EdgetuneError:
        return False
    return True


def open_base(bundle: Path, manifest: Manifest, options: OpeningOptions) -> Pool | Classifier:
    """Check and load the base; errors as those of `Runtime.open`."""
    with unchanged(bundle, files_beside(manifest, manifest.base.files[options.engine]) if options.verify else ()):
        return _open_base(bundle, manifest, options)


def _open_base(bundle: Path, manifest: Manifest, options: OpeningOptions) -> Pool | Classifier:
    if options.map_large_blocks:
        _map_large_blocks()
    file = manifest.base.files[options.engine]
    path, fingerprint = _checked(bundle, manifest, file, options)
    if fingerprint != manifest.base.fingerprint:
        raise VerificationError(f"{file} is not the base that the adapters were made for", "build the bundle again")
    make = engines.load(options.engine, manifest.task)
    needed_mb = context_mb(manifest, options)
    _check_free(needed_mb, options)
    threads = compute_threads(options.priority)
    if not make.has_sequence:
        plain = partial(make, path, context_length=options.context_length, threads=options.threads)
        return Classifier(_loaded(plain, threads), threads)
    running = _load(make, path, options, threads)
    store = None
    if options.disk_mb > 0:
        try:
            folder = Path(options.cache_folder or default_folder())
            store = StateStore(folder, options.disk_mb, options.disk_mb_per_day)
        except UsageError as error:
            _LOG.warning("states of prompts are not saved on disk: %s", error)
    shared = SharedResources(
        digest_of_model(manifest.files, file),
        round(needed_mb * 1e6 / options.context_length),
        StateCache(options.cache_mb, options.emit),
        Governor(running.threads, adjusts=running.adjusts_threads),
        {name: entry.invocation for name, entry in manifest.adapters.items() if entry.invocation},
        _prompts(bundle, manifest, running, options, store),
        # What is free now, with the weights and the first context in memory.
        places=Places(options.contexts or _contexts(needed_mb, free_mb()), options.max_waiting),
        exact=options.exact,
        threads=threads,
        emit=options.emit,
    )
    return Pool(Context(running, shared))


def open_merged(bundle: Path, manifest: Manifest, file: str, options: OpeningOptions, *, base: SharedResources) -> Pool:
    """Check and load the merged model in `file`, which shares with the base what the models of one runtime share.

    Errors as `open_base`.
    """
    with unchanged(bundle, files_beside(manifest, file) if options.verify else ()):
        path, _ = _checked(bundle, manifest, file, options)
        _check_free(context_mb(manifest, options), options)
        running = _load(engines.load(options.engine), path, options, base.threads)
        store = None if base.prompts is None else base.prompts.store
        prompts, governor = _prompts(bundle, manifest, running, options, store), base.governor.beside()
        shared = replace(base, base=digest_of_model(manifest.files, file), prompts=prompts, governor=governor)
        return Pool(Context(running, shared))


def past_answers(
    manifest: Manifest, running: Pool | Classifier, options: OpeningOptions, adapters: Callable[[], Collection[str]]
) -> PastAnswers | None:
    """The past answers of a base, which are kept for these adapters; None if none are to be kept."""
    learns, path = options.learn_drafts, None
    if learns == OFF or not isinstance(running, Pool):
        return None
    if learns == DISK:
        folder = Path(options.cache_folder or default_folder())
        path = path_of(folder, manifest.name, manifest.base.fingerprint)
    with running.tokenizer() as tokenizer:
        return PastAnswers(tokenizer.vocab_size, path, adapters)


def _checked(bundle: Path, manifest: Manifest, file: str, options: OpeningOptions) -> tuple[Path, str | None]:
    """The path of a model, and its fingerprint, after the digests of all its files were compared."""
    path = resolve(bundle, file)
    if options.verify:
        # The file itself first: which others belong to it is read from it.
        verify_files(bundle, manifest, [file])
    parts, fingerprint = engines.load(options.engine, manifest.task).examine(path, manifest.files[file].sha256)
    if options.verify:
        root = bundle.resolve()
        verify_files(bundle, manifest, [part.relative_to(root).as_posix() for part in parts[1:]])
    return path, fingerprint


def _check_free(needed_mb: float, options: OpeningOptions) -> None:
    """Raise IncompatibleError unless a context fits in the free memory; Linux would kill the process instead."""
    free = free_mb()
    if free is not None and needed_mb > free:
        message = f"a context of {options.context_length} tokens takes {needed_mb:.0f} MB, and {free:.0f} MB are free"
        raise IncompatibleError(message, "open the bundle with a smaller context_length")


def _load(make: EngineClass, path: Path, options: OpeningOptions, threads: ComputeThreads | None) -> Engine:
    load = partial(
        make,
        path,
        context_length=options.context_length,
        threads=options.threads,
        kv=options.kv,
        repack=options.repack,
    )
    return _loaded(load, threads)


def _loaded(load: Callable[[], T], threads: ComputeThreads | None) -> T:
    """The engine; threads that it starts have the priority of the one that loads it."""
    return load() if threads is None else threads.run(load)


def _map_large_blocks() -> None:
    """Have glibc return each block of 1 MiB and more to the system once it is freed; see mallopt(3).

    By itself glibc raises that limit up to 32 MiB, and then blocks that come and go leave holes in the heap; those of
    llama.cpp do, as mapping the states alone saves nothing.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _prompts(
    bundle: Path, manifest: Manifest, running: Engine, options: OpeningOptions, store: StateStore | None
) -> PromptStates:
    digests = {
        name: digest_of_model(manifest.files, entry.files[options.engine])
        for name, entry in manifest.adapters.items()
        if options.engine in entry.files
    }
    shipped_store = None
    if any(name.startswith(f"{STATES_FOLDER}/") for name in manifest.files):
        verify = (
            (lambda path: verify_files(bundle, manifest, [f"{STATES_FOLDER}/{path.name}"])) if options.verify else None
        )
        shipped_store = StateStore(bundle / STATES_FOLDER, 0, verify=verify)
    return PromptStates(running.signatures, manifest.name, digests, store, shipped_store)


def _contexts(needed_mb: float, free: float | None) -> int:
    """How many contexts there may be: the first one, and those that fit in a share of the memory free beside it."""
    if free is None:
        return 1
    return min(_MAX_CONTEXTS, 1 + int(free * _SHARE_OF_FREE / max(needed_mb, 1)))
