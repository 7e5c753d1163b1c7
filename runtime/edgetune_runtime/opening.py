"""Opens a bundle: checks its files, loads the base within the free memory, and finds the places of its states."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from .bundle import STATES_FOLDER, Manifest, resolve, unchanged, verify_files
from .engines.base import Engine, EngineClass, LabelEngineClass, check_kv
from .errors import IncompatibleError, VerificationError
from .events import Emit, ignore
from .formats.quantization import TENSOR_TYPES
from .serving.classifier import Classifier
from .serving.context import Context
from .serving.governor import Governor
from .serving.jobs import Shared
from .serving.places import Places
from .serving.pool import Pool
from .states.cache import StateCache
from .states.prompts import PromptStates
from .states.store import StateStore
from .threads.machine import free_mb
from .threads.priority import NORMAL, ComputeThreads, compute_threads

T = TypeVar("T")

_M_MMAP_THRESHOLD = -3

_MOST_CONTEXTS = 4
_SHARE_OF_FREE = 0.25
"""Share of the free memory that additional contexts may use."""


@dataclass(frozen=True)
class OpeningOptions:
    """How a bundle is opened; see `Runtime.open`."""

    engine: str
    make: EngineClass | LabelEngineClass
    context_length: int
    threads: int | None = None
    kv: str | None = None
    repack: bool | None = None
    verify: bool = True
    cache_mb: float = 0.0
    exact: bool = True
    store: StateStore | None = None
    contexts: int | None = None
    waiting: int = 0
    priority: str = NORMAL
    map_large_blocks: bool = False
    drafts: bool = True
    merged_mb: float | None = None
    emit: Emit = ignore


def file_of(files: Mapping[str, str], engine: str, what: str) -> str:
    """The file for an engine; IncompatibleError where there is none."""
    if engine not in files:
        message = f"{what} has no file for engine {engine!r}"
        raise IncompatibleError(message, f"use one of: {', '.join(files) or 'none'}")
    return files[engine]


def open_base(bundle: Path, manifest: Manifest, file: str, options: OpeningOptions) -> Pool | Classifier:
    """Check and load the base that the bundle has in `file`; errors as those of `Runtime.open`."""
    with unchanged(bundle, manifest.files if options.verify else ()):
        return _open_base(bundle, manifest, file, options)


def _open_base(bundle: Path, manifest: Manifest, file: str, options: OpeningOptions) -> Pool | Classifier:
    if options.map_large_blocks:
        _map_large_blocks()
    path, _, fingerprint = _checked(bundle, manifest, file, options)
    if fingerprint != manifest.base.fingerprint:
        raise VerificationError(f"{file} is not the base that the adapters were made for", "build the bundle again")
    make = options.make
    context_mb = _context_mb(manifest, options)
    _check_free(context_mb, options)
    threads = compute_threads(options.priority)
    if not make.has_sequence:
        plain = partial(make, path, context_length=options.context_length, threads=options.threads)
        return Classifier(_loaded(plain, threads), threads)
    running = _load(make, path, options, threads)
    shared = Shared(
        manifest.files[file].sha256,
        int(manifest.base.kv_values_per_token * running.kv_bytes),
        StateCache(options.cache_mb, options.emit),
        Governor(running.threads, adjusts=running.adjusts_threads),
        {name: entry.invocation for name, entry in manifest.adapters.items() if entry.invocation},
        _prompts(bundle, manifest, running, options),
        # What is free now, with the weights and the first context in memory.
        places=Places(options.contexts or _contexts(context_mb, free_mb()), options.waiting),
        exact=options.exact,
        threads=threads,
        emit=options.emit,
    )
    return Pool(Context(running, shared))


def open_merged(
    bundle: Path,
    manifest: Manifest,
    file: str,
    options: OpeningOptions,
    *,
    base: Shared,
    make_room: Callable[[float], None],
) -> Pool:
    """Check and load the merged model in `file`, which shares with the base what the models of one runtime share.

    `make_room` is called with the MB of its weights and of one context before it is loaded. Errors as `open_base`.
    """
    with unchanged(bundle, manifest.files if options.verify else ()):
        path, parts, _ = _checked(bundle, manifest, file, options)
        context_mb = _context_mb(manifest, options)
        make_room(sum(part.stat().st_size for part in parts) / 1e6 + context_mb)
        _check_free(context_mb, options)
        assert options.make.has_sequence
        running = _load(options.make, path, options, base.threads)
        prompts, governor = _prompts(bundle, manifest, running, options), base.governor.beside()
        shared = replace(base, base=manifest.files[file].sha256, prompts=prompts, governor=governor)
        return Pool(Context(running, shared))


def _checked(
    bundle: Path, manifest: Manifest, file: str, options: OpeningOptions
) -> tuple[Path, list[Path], str | None]:
    """The path of a model, all its files, and its fingerprint, after their digests were compared."""
    path = resolve(bundle, file)
    if options.verify:
        # The file itself first: which others belong to it is read from it.
        verify_files(bundle, manifest, [file])
    parts, fingerprint = options.make.examine(path, manifest.files[file].sha256)
    if options.verify:
        root = bundle.resolve()
        verify_files(bundle, manifest, [part.relative_to(root).as_posix() for part in parts[1:]])
    return path, parts, fingerprint


def _context_mb(manifest: Manifest, options: OpeningOptions) -> float:
    """The memory of the keys and values of one context."""
    make = options.make
    bytes_per_number = make.bytes_per_number
    if make.has_sequence:
        check_kv(options.kv, make.KV, options.engine)
        bytes_per_number = TENSOR_TYPES[options.kv or make.KV[0]].bytes_per_value
    return manifest.base.kv_values_per_token * bytes_per_number * options.context_length / 1e6


def _check_free(context_mb: float, options: OpeningOptions) -> None:
    """Raise IncompatibleError unless a context fits in the free memory; Linux would kill the process instead."""
    free = free_mb()
    if free is not None and context_mb > free:
        message = f"a context of {options.context_length} tokens takes {context_mb:.0f} MB, and {free:.0f} MB are free"
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


def _prompts(bundle: Path, manifest: Manifest, running: Engine, options: OpeningOptions) -> PromptStates:
    digests = {
        name: manifest.files[entry.files[options.engine]].sha256
        for name, entry in manifest.adapters.items()
        if options.engine in entry.files
    }
    shipped = [name for name in manifest.files if name.startswith(f"{STATES_FOLDER}/")]
    if shipped and options.verify:
        verify_files(bundle, manifest, shipped)
    store = StateStore(bundle / STATES_FOLDER, 0) if shipped else None
    return PromptStates(running.signatures, manifest.name, digests, options.store, store)


def _contexts(context_mb: float, free: float | None) -> int:
    """How many contexts there may be: the first one, and those that fit in a share of the memory free beside it."""
    if free is None:
        return 1
    return min(_MOST_CONTEXTS, 1 + int(free * _SHARE_OF_FREE / max(context_mb, 1)))
