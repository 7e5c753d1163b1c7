"""The options of `Runtime.open`, and what they, the manifest and the machine decide before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypedDict, TypeGuard, Unpack

from edgetune_runtime import engines
from edgetune_runtime.bundle import Manifest
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import ADAPTERS_MB
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.events import Emit, Event, safely
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from edgetune_runtime.states.cache import CACHE_MB
from edgetune_runtime.threads.machine import threads_for
from edgetune_runtime.threads.priority import NORMAL
from edgetune_runtime.wording import suggestion

from .deferring import DeferTo

_LOG = logging.getLogger(__name__)

DISK_MB = 512
DISK_MB_PER_DAY = 512
MAX_WAITING = 64
OFF, MEMORY, DISK = "off", "memory", "disk"
LEARN_DRAFTS = (OFF, MEMORY, DISK)
_SIZES = ("cache_mb", "disk_mb", "disk_mb_per_day", "adapters_mb")
ALL = "all"
"""Value of `preload` for all adapters."""


class RuntimeOptions(TypedDict, total=False):
    """Options of `Runtime.open`.

    `engine` is gguf or onnx, by default the first format of the bundle. `context_length` (tokens) and `threads` default
    to the manifest's. `kv` is the data type of the KV cache: with gguf f16 or q8_0, which halves the cache and every
    state; with onnx only f32. With `repack`, llama.cpp reads the weights into memory in the layout that is fastest on
    this processor, instead of mapping the file, which processes can share; by default it does so where it has code for
    it (q4_0, q4_K, iq4_nl; not on a Pi 4). onnxruntime always repacks. `verify` (default: True) compares digests before
    anything is loaded; without it, only the structure of the files is checked.

    An adapter's files are checked and read when it is first used. Up to `adapters_mb` of memory (10^6 bytes, default:
    256) is used for adapters that are not merged. When the next one does not fit, those that no call uses are dropped,
    the least recently used first, and read again by the next call that needs them; a call waits where others use too
    many. `preload` lists adapters to load at opening and to keep in memory, or is "all"; not for merged ones.

    A merged adapter is a full model, which is checked and mapped on first use. Up to `merged_mb` of memory is used for
    such models, each with one context; by default what is free. When the next one does not fit, those that no call uses
    are closed, the least recently used first, and opened again by the next call that needs them.

    Up to `cache_mb` of memory (10^6 bytes, default: 128) is used for states: of each adapter's fixed prompt, of
    sessions, and the last one of each set of adapters, so that switching back does not recompute the prompt. States of
    fixed prompts are also saved in `cache_folder` (default: `$EDGETUNE_CACHE`, else edgetune/states in the user's cache
    folder), up to `disk_mb` (512); 0 saves none. Calls write up to `disk_mb_per_day` (512) to it, and with 0 only
    `warm` does.

    With `exact` (default: True), a call gives the same answer, bit for bit, as with a cold cache: it reuses only fixed
    prompts and whole chunks of 128 tokens. With onnx, a step of one token computes a second row where drafts or a
    constraint give other steps more, as one row rounds differently from several. Without it, a call reuses all tokens
    of the common prefix, as a session does with its own state; rounding may then decide a near tie between two tokens
    differently.

    Up to `contexts` calls run at the same time, with whatever adapters, each in its own context, which is created when
    first needed; by default one, and more if they fit in a quarter of the memory that is free beside it, at most 4. If
    there is no memory for one of them after all, a warning is logged, and calls wait for those that there are. Up to
    `max_waiting` more calls wait (64); the next one raises BusyError.

    With gguf, fewer threads than `threads` compute while other processes use the cores; this changes no answer.
    `priority` is the priority of the compute threads, on Linux: normal (the default), low (below the threads of normal
    processes) or idle (only on cores that are otherwise idle).

    `map_large_blocks` sets M_MMAP_THRESHOLD of glibc's malloc to 1 MiB for the whole process, unless the variable
    MALLOC_MMAP_THRESHOLD_ is set, so that temporary large blocks do not fragment the heap. Resident memory with
    SmolLM2-135M and eight adapters after 216 answers: 478 MB instead of 509 MB. Without the option, or without glibc,
    malloc is not changed.

    With `drafts` (default: True), tokens are drafted from the adapter's draft table and from the prompt, and verified
    several per step (speculative decoding). With llama.cpp's llamafile kernels (LLAMAFILE among the features that
    `edgetune-run doctor` prints), with k-quants, and with onnx without `exact` or for recurrent layers, rounding may
    then decide a near tie between two tokens differently; else this changes no answer.

    With `learn_drafts` "memory" or "disk" (default: "off"), the last answer to each prompt is kept, up to 4 MB in all,
    and drafts the next answer to the same prompt. With "disk" they are also saved in `cache_folder`, about every hour
    and by `close`, in a file that only this user can read: it has the answers' tokens and digests of the prompts.
    `clear_cache` forgets them. A near tie may then be decided differently when a prompt comes again.

    With `preflight` (default: True), a bundle that was not opened before on this machine is first opened in a child
    process, with limits of memory and time and, on Linux, without network: a crash of native code is then a
    VerificationError. That a bundle passed is remembered in `cache_folder`, also with `disk_mb` 0. EDGETUNE_PREFLIGHT=0
    in the environment turns it off.

    With `trusted_keys`, a file of `edgetune keys init`, a bundle must be signed by one of these keys, and so must those
    that `add_adapter` reads: another one is a VerificationError before anything else of it is read.

    `defer_to` is the bigger model that answers in place of unsure answers, where the recipe or a call says `defer`; a
    prompt is sent to no other address.

    `on_event` is called with each `Event`, on the thread of the call and while it holds its context: it must be quick
    and must not call the runtime. Its errors are logged.
    """

    engine: str | None
    threads: int | None
    context_length: int | None
    kv: str | None
    repack: bool | None
    verify: bool
    exact: bool
    cache_mb: float
    disk_mb: float
    disk_mb_per_day: float
    cache_folder: str | Path | None
    contexts: int | None
    max_waiting: int
    priority: str
    map_large_blocks: bool
    drafts: bool
    learn_drafts: str
    adapters_mb: float
    preload: Sequence[str]
    merged_mb: float | None
    preflight: bool
    trusted_keys: str | Path | None
    defer_to: DeferTo | None
    on_event: Callable[[Event], None] | None


@dataclass(frozen=True)
class OpeningOptions:
    """How a bundle is opened, decided by `decide`; the fields are those of `RuntimeOptions`.

    Only what depends on the loaded base or on the memory beside it is still open: None lets llama.cpp choose whether to
    `repack`, and free memory choose `contexts` and `merged_mb`. `kv` is None for a base without a KV cache.
    """

    engine: str
    context_length: int
    threads: int
    kv: str | None = None
    repack: bool | None = None
    verify: bool = True
    exact: bool = True
    cache_mb: float = CACHE_MB
    disk_mb: float = DISK_MB
    disk_mb_per_day: float = DISK_MB_PER_DAY
    cache_folder: str | Path | None = None
    contexts: int | None = None
    max_waiting: int = MAX_WAITING
    priority: str = NORMAL
    map_large_blocks: bool = False
    drafts: bool = True
    learn_drafts: str = OFF
    adapters_mb: float = ADAPTERS_MB
    preload: Sequence[str] = ()
    merged_mb: float | None = None
    preflight: bool = True
    trusted_keys: str | Path | None = None
    defer_to: DeferTo | None = None
    on_event: Callable[[Event], None] | None = None

    @cached_property
    def emit(self) -> Emit:
        """`on_event`, whose errors are logged."""
        return safely(self.on_event)


def decide(manifest: Manifest, **options: Unpack[RuntimeOptions]) -> OpeningOptions:
    """How a bundle is opened on this machine; loads nothing, and imports no engine.

    Raises UsageError for invalid options, IncompatibleError if the base has no file for the engine.
    """
    names = tuple(RuntimeOptions.__annotations__)
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        raise UsageError(f"Runtime.open has no option {unknown!r}", suggestion(unknown, names))
    _check_values(manifest, options)
    engine = options.get("engine") or next(iter(manifest.base.files), gguf.NAME)
    engines.check_name(engine)
    file_of(manifest.base.files, engine, "the base")
    _check_preload(manifest, options.get("preload", ()))
    requested = options.get("threads")
    requested = manifest.threads if requested is None else requested
    threads = threads_for(requested)
    if requested is not None and threads < requested:
        _LOG.warning("threads=%d, but only %d cores are available", requested, threads)
    decided: dict[str, Any] = {
        "engine": engine,
        "threads": threads,
        "context_length": options.get("context_length") or manifest.context_length,
        "kv": engines.check_kv(engine, options.get("kv")) if manifest.base.is_decoder else None,
    }
    return OpeningOptions(**{**options, **decided})


def context_mb(manifest: Manifest, options: OpeningOptions) -> float:
    """The memory of the keys and values of one context."""
    if options.kv is None:
        return 0.0
    values = manifest.base.kv_values_per_token * options.context_length
    return values * TENSOR_TYPES[options.kv].bytes_per_value / 1e6


def file_of(files: Mapping[str, str], engine: str, owner: str) -> str:
    """The file for an engine; IncompatibleError where there is none."""
    if engine not in files:
        message = f"{owner} has no file for engine {engine!r}"
        raise IncompatibleError(message, f"use one of: {', '.join(files) or 'none'}")
    return files[engine]


def _check_preload(manifest: Manifest, preload: Sequence[str]) -> None:
    if preload == ALL:
        return
    if isinstance(preload, str) or not isinstance(preload, Collection):
        raise UsageError(f"preload is {preload!r}", f"give a list of adapters, or {ALL!r}")
    for name in preload:
        manifest.adapter(name)


def check_context_length(length: int | None, trained: int) -> None:
    """UsageError for a context that no runtime opens a base with; `trained` is the longest one, None the default."""
    if length is not None and not (_is_whole(length) and 2 <= length <= trained):
        remedy = f"give 2 to {trained}, the context length that the base was trained for"
        raise UsageError(f"context_length is {length!r}", remedy)


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _check_values(manifest: Manifest, options: RuntimeOptions) -> None:
    check_context_length(options.get("context_length"), manifest.base.trained_context_length)
    learn_drafts = options.get("learn_drafts", OFF)
    if learn_drafts not in LEARN_DRAFTS:
        raise UsageError(f"learn_drafts is {learn_drafts!r}", f"give one of: {', '.join(LEARN_DRAFTS)}")
    if learn_drafts != OFF and not options.get("drafts", True):
        raise UsageError(f"learn_drafts is {learn_drafts!r}, and drafts is False", "leave out one of them")
    if options.get("trusted_keys") is not None and not options.get("verify", True):
        raise UsageError("trusted_keys is given, and verify is False", "leave out one of them")
    for name in ("repack", "verify", "exact", "map_large_blocks", "drafts"):
        if options.get(name) not in (None, True, False):
            raise UsageError(f"{name} is {options.get(name)!r}", "give True or False")
    # Without a limit, merged models use what memory is free.
    sizes = {name: options.get(name, 0) for name in _SIZES} | {"merged_mb": options.get("merged_mb") or 0}
    for name, size_mb in sizes.items():
        if not (isinstance(size_mb, Real) and float(size_mb) >= 0):
            raise UsageError(f"{name} is {size_mb!r}", "give a number of at least 0")
    contexts, threads = options.get("contexts"), options.get("threads")
    _check_number("contexts", 1 if contexts is None else contexts, 1)
    _check_number("threads", 1 if threads is None else threads, 1)
    _check_number("max_waiting", options.get("max_waiting", MAX_WAITING), 0)
    on_event, defer_to = options.get("on_event"), options.get("defer_to")
    if on_event is not None and not callable(on_event):
        raise UsageError(f"on_event is {on_event!r}", "give a function that takes an Event")
    if defer_to is not None and not isinstance(defer_to, DeferTo):
        raise UsageError(f"defer_to is {defer_to!r}", "give a DeferTo")


def _check_number(name: str, number: object, least: int) -> None:
    if not (_is_whole(number) and number >= least):
        raise UsageError(f"{name} is {number!r}", f"give a whole number of at least {least}")
