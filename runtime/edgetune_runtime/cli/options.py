"""The options that commands share, and what they are parsed into: an open runtime, a prompt, answer options."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from edgetune_runtime.engines.needs import ADAPTERS_MB
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.inference.deferring import TIMEOUT_S, DeferTo
from edgetune_runtime.inference.opening_options import ALL, DISK_MB_PER_DAY, LEARN_DRAFTS, OFF, RuntimeOptions
from edgetune_runtime.states.cache import CACHE_MB
from edgetune_runtime.threads.priority import NORMAL, PRIORITIES

if TYPE_CHECKING:
    from edgetune_runtime.inference.runtime import Runtime

SAMPLING = {
    "temperature": (
        float,
        "randomness; 0 always takes the most likely token (default: 0; the next three then have no effect)",
    ),
    "top_k": (int, "sample from this many most likely tokens; 0: all (default: 40)"),
    "top_p": (float, "sample from the most likely tokens whose probabilities add up to this; 1: all (default: 0.95)"),
    "min_p": (float, "drop tokens below this fraction of the top token's probability; 0: none (default: 0.05)"),
    "repeat_penalty": (float, "penalize tokens that are among the last 64; 1: no penalty (default: 1)"),
    "seed": (int, "random seed, to get the same answer again"),
    "max_tokens": (int, "maximum length of the answer in tokens (default: 256)"),
}
"""Types and help texts of the options. The defaults are those of `Sampling`, whose module needs numpy."""
DEFER_KEY = "EDGETUNE_DEFER_KEY"
_SIZES = ("adapters_mb", "cache_mb", "disk_mb_per_day")


def add_cache_folder(group: argparse._ActionsContainer) -> None:
    """The folder of saved states."""
    text = "folder for prompt states (default: $EDGETUNE_CACHE, else edgetune/states in the user's cache folder)"
    group.add_argument("--cache-folder", type=Path, metavar="DIR", help=text)


def add_sampling(command: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and when an answer ends."""
    group = command.add_argument_group("sampling")
    for name, (kind, text) in SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    text = "end the answer before this text; may be repeated"
    group.add_argument("--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help=text)


def add_form(command: argparse.ArgumentParser) -> None:
    """What form answers must have."""
    group = command.add_argument_group("output constraint (default: the adapter's own, if it has one)")
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--schema", type=Path, metavar="FILE", help="answer in JSON that matches this JSON Schema")
    forms.add_argument("--choices", metavar="A,B", help="answer with one of these texts")
    forms.add_argument("--regex", metavar="REGEX", help="answer with a text that matches this regular expression")
    forms.add_argument("--grammar", type=Path, metavar="FILE", help="answer with a text of this Lark grammar")
    forms.add_argument("--unconstrained", action="store_true", help="do not constrain the answer")


def add_min_confidence(group: argparse._ActionsContainer) -> None:
    """Which answers are not sure enough."""
    text = "an answer with a lower confidence, 0 to 1, is unsure (default: what the recipe says)"
    group.add_argument("--min-confidence", type=float, metavar="N", help=text)


def add_unsure(command: argparse.ArgumentParser) -> None:
    """What becomes of answers that are not sure enough."""
    group = command.add_argument_group("confidence")
    add_min_confidence(group)
    rules = group.add_mutually_exclusive_group()
    text = "in place of an unsure answer: mark (none), ask (the recipe's question), base, another adapter, error, or "
    text += "defer (the model of --defer-to)"
    rules.add_argument("--unsure", metavar="NAME", help=text)
    rules.add_argument("--ask", metavar="TEXT", help="ask this in place of an unsure answer")


def add_tools(command: argparse.ArgumentParser) -> None:
    """The tools that an answer may call."""
    text = "offer the tools in this JSON file, a list of function definitions as in OpenAI's API"
    command.add_argument("--tools", type=Path, metavar="FILE", help=text)
    text = "with --tools: auto (default), required, none, or the name of the tool to call"
    command.add_argument("--tool-choice", metavar="CHOICE", help=text)


def add_opening(command: argparse.ArgumentParser, *, is_answering: bool) -> None:
    """How the bundle is opened; see `open_runtime`. Only commands that answer have the options of answers."""
    group = command.add_argument_group("opening the bundle")
    text = "engine: gguf or onnx (default: the bundle's first format)"
    group.add_argument("--engine", metavar="NAME", help=text)
    group.add_argument("--threads", type=int, metavar="N", help="number of compute threads (default: the bundle's)")
    text = "maximum tokens of prompt and answer together (default: the bundle's)"
    group.add_argument("--context-length", type=int, metavar="N", help=text)
    text = "data type of the KV cache: f16 or q8_0 with gguf, f32 with onnx"
    group.add_argument("--kv", metavar="TYPE", help=text)
    text = "gguf: repack the weights in memory for this processor, or map the file (default: whichever is faster)"
    group.add_argument("--repack", action=argparse.BooleanOptionalAction, help=text)
    text = "priority of the compute threads: normal, or low or idle to let other processes run first (Linux only)"
    group.add_argument("--priority", choices=PRIORITIES, default=NORMAL, help=text)
    text = f"memory for loaded adapters in MB, with LRU eviction (default: {ADAPTERS_MB})"
    group.add_argument("--adapters-mb", type=float, metavar="N", help=text)
    text = "load this adapter at the start and keep it in memory, or all; may be repeated"
    group.add_argument("--preload", action="append", default=[], metavar="NAME", help=text)
    text = f"memory for prompt states in MB (default: {CACHE_MB})"
    group.add_argument("--cache-mb", type=float, metavar="N", help=text)
    add_cache_folder(group)
    text = "most MB per day that calls write to that folder; with 0 only `warm` and `--warm` do"
    group.add_argument("--disk-mb-per-day", type=float, metavar="N", help=f"{text} (default: {DISK_MB_PER_DAY})")
    text = "decode token by token, without drafts from the adapter's draft table"
    group.add_argument("--no-drafts", action="store_true", help=text)
    if is_answering:
        _add_answering(group)
    else:
        command.set_defaults(learn_drafts=OFF, defer_to=None, defer_model=None, defer_timeout_s=None)
    text = "do not open a new bundle in a child process first, which turns a crash into an error"
    group.add_argument("--no-preflight", action="store_true", help=text)
    group.add_argument("--no-verify", action="store_true", help="do not compare the files with their digests")
    text = "refuse a bundle that is not signed by a key in this file, the trusted-keys.json of `edgetune keys init`"
    group.add_argument("--trusted-keys", type=Path, metavar="FILE", help=text)


def _add_answering(group: argparse._ActionsContainer) -> None:
    text = "keep the last answer to each prompt as a draft of the next one: off (default), in memory, or also on disk"
    group.add_argument("--learn-drafts", choices=LEARN_DRAFTS, default=OFF, help=text)
    text = "let a bigger model at this OpenAI-compatible address answer where a recipe or a request says defer"
    group.add_argument("--defer-to", metavar="URL", help=f"{text}; a key is read from {DEFER_KEY}")
    group.add_argument("--defer-model", metavar="NAME", help="name of that model")
    text = f"seconds that its answer may take (default: {TIMEOUT_S:g})"
    group.add_argument("--defer-timeout-s", type=float, metavar="N", help=text)


def open_runtime(options: argparse.Namespace, **more: Unpack[RuntimeOptions]) -> Runtime:
    """The bundle of the command line, opened with its options and `more` of `Runtime.open`."""
    # numpy and the engine are loaded only when a command needs them.
    from edgetune_runtime.inference.runtime import Runtime  # noqa: PLC0415

    opening = opening_options(options)
    opening.update(more)
    return Runtime.open(options.bundle, **opening)


def opening_options(options: argparse.Namespace) -> RuntimeOptions:
    """The options of `Runtime.open` on the command line; UsageError for an invalid size."""
    sizes = {name: value for name in _SIZES if (value := getattr(options, name)) is not None}
    for name, value in sizes.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {value:g}", "give 0 or more")
    opening = {
        "engine": options.engine,
        "threads": options.threads,
        "context_length": options.context_length,
        "kv": options.kv,
        "repack": options.repack,
        "priority": options.priority,
        "verify": not options.no_verify,
        "cache_folder": options.cache_folder,
        "map_large_blocks": True,
        "drafts": not options.no_drafts,
        "learn_drafts": options.learn_drafts,
        "preflight": not options.no_preflight,
        "trusted_keys": options.trusted_keys,
        "preload": ALL if ALL in options.preload else options.preload,
        "defer_to": _defer_to(options),
    }
    return cast("RuntimeOptions", opening | sizes)


def _defer_to(options: argparse.Namespace) -> DeferTo | None:
    if (options.defer_to is None) != (options.defer_model is None):
        raise UsageError("only one of --defer-to and --defer-model is given", "give both, or neither")
    if options.defer_to is None:
        if options.defer_timeout_s is not None:
            raise UsageError("--defer-timeout-s is given without --defer-to", "give both, or neither")
        return None
    timeout = {} if options.defer_timeout_s is None else {"timeout_s": options.defer_timeout_s}
    return DeferTo(options.defer_to, options.defer_model, key=os.environ.get(DEFER_KEY), **timeout)


def prompt_of(options: argparse.Namespace) -> str:
    """The prompt on the command line, or standard input for `-`."""
    text: str = options.prompt
    return sys.stdin.read().removesuffix("\n") if text == "-" else text


def answer_options(options: argparse.Namespace) -> dict[str, Any]:
    """The answer options on the command line; the others have the defaults of `AnswerOptions`."""
    values = vars(options)
    answer: dict[str, Any] = {name: values[name] for name in (*SAMPLING, "stop", "logprobs") if name in values}
    if "logprobs" in answer and not options.json:
        raise UsageError("--logprobs is given without --json", "add --json")
    files = {name: _read(values[name]) for name in ("schema", "grammar") if values[name] is not None}
    choices = {} if options.choices is None else {"choices": [text.strip() for text in options.choices.split(",")]}
    tools = {} if values.get("tools") is None else {"tools": _read_json(options.tools)}
    answer |= {name: values.get(name) for name in ("min_confidence", "unsure", "ask")}
    answer |= {"tool_choice": values.get("tool_choice"), "regex": options.regex, "unconstrained": options.unconstrained}
    return {**answer, **files, **choices, **tools}


def _read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}", "give a list of tools") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise NotFoundError(f"cannot read {path}: {reason}", "give a text file") from error
