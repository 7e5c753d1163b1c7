"""The command line of `edgetune-run`: options, commands and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .bundle import GENERATION, Manifest, read_manifest, verify_files
from .conversation import PROGRAM, Conversation, adapter_choice, show
from .errors import CancelledError, EdgetuneError, IncompatibleError, NotFoundError, UsageError
from .formats.quantization import describe, repacked_types
from .interrupts import end_on_interrupt
from .server import command as server
from .threads.priority import NORMAL, PRIORITIES
from .voice import command as wyoming

if TYPE_CHECKING:
    from .runtime import Runtime

SAMPLING = {
    "temperature": (float, "randomness; 0 always takes the most likely token (default)"),
    "top_k": (int, "sample from this many most likely tokens; 0: all"),
    "top_p": (float, "sample from the most likely tokens whose probabilities add up to this; 1: all"),
    "min_p": (float, "drop tokens below this fraction of the top token's probability; 0: none"),
    "repeat_penalty": (float, "penalize tokens that are among the last 64; 1: no penalty"),
    "seed": (int, "random seed, to get the same answer again"),
    "max_tokens": (int, "maximum length of the answer in tokens"),
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{PROGRAM}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 or the exit code of the error, which is printed to standard error in one line."""
    end_on_interrupt()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        with _logging(debug=options.debug):
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe; without this, Python prints an error when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _fail(CancelledError("interrupted"), debug=False)
    except EdgetuneError as error:
        return _fail(error, debug=options.debug)
    except Exception as error:
        what = EdgetuneError(f"unexpected {type(error).__name__}: {error}", "run again with --debug and report it")
        return _fail(what, debug=options.debug)
    return 0


@contextmanager
def _logging(*, debug: bool) -> Iterator[None]:
    """Write edgetune's own warnings, or with `debug` all log messages, to standard error while the block runs."""
    logger, handler = logging.getLogger(__package__), logging.StreamHandler()
    if not debug:
        # What matters in these logs is raised as an error.
        handler.addFilter(lambda record: not record.name.endswith(("llama_cpp", "onnxruntime")))
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(levelname)s: %(message)s"))
    before = logger.level
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _fail(error: EdgetuneError, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(PROGRAM, description="Run an edgetune bundle: one base, and adapters that switch in microseconds.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    info = _command(commands, "info", _info, "show what is in a bundle, without loading it")
    info.add_argument("--verify", action="store_true", help="also compare every file with its digest")
    generate = _command(commands, "generate", _generate, "answer one prompt and print the text as it is generated")
    classify = _command(commands, "classify", _classify, "print the labels for a prompt with their probabilities")
    chat = _command(commands, "chat", _chat, "chat with the base and its adapters")
    bench = _command(commands, "bench", _bench, "measure load time, switching, time to first token, speed and memory")
    check = _command(commands, "check", _check, "compare the answers on this machine with those that the build stored")
    warm = _command(commands, "warm", _warm, "compute the states of the adapters' fixed prompts and save them to disk")
    serve = _command(commands, "serve", _serve, "answer requests of OpenAI's and Ollama's APIs over HTTP")
    voice = _command(commands, "wyoming", _wyoming, "answer voice assistants over the Wyoming protocol")
    text = "show the cores, memory and libraries of this machine, and what slows answers down"
    doctor = commands.add_parser("doctor", help=text, description=f"{text[0].upper()}{text[1:]}.")
    doctor.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="also try the bundle in this folder")
    text = "write what this machine sustains with the bundle to FILE, for `edgetune devices fit --calibration FILE`"
    doctor.add_argument("--calibrate", type=Path, metavar="FILE", help=text)
    text = "predict with the figures in FILE (default: with the memory bandwidth measured here)"
    doctor.add_argument("--calibration", type=Path, metavar="FILE", help=text)
    _common(doctor, _doctor)
    _add_cache(commands)
    for command in (generate, classify):
        command.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; - reads standard input")
    for command in (generate, classify, chat):
        text = "answer with this adapter at SCALE (default: the bundle's); may be repeated; omit it for the plain base"
        command.add_argument("--adapter", action="append", default=[], metavar="NAME[=SCALE]", help=text)
    text = "with --json: print each token's log-probability, and those of the N likeliest tokens at its place (0 to 20)"
    generate.add_argument("--logprobs", type=int, default=argparse.SUPPRESS, metavar="N", help=text)
    classify.add_argument("--labels", metavar="A,B,C", help="comma-separated labels (default: the adapter's)")
    for command in (generate, chat):
        _add_sampling(command)
    _add_form(generate)
    _add_tools(generate)
    _add_form(chat)
    server.add_options(serve)
    wyoming.add_options(voice)
    for command in (generate, classify, chat, bench, check, warm, serve, voice, doctor):
        _add_opening(command)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    return _common(command, run)


def _common(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    command.add_argument("--json", action="store_true", help="write JSON to standard output")
    command.add_argument("--debug", action="store_true", help="print tracebacks of errors and all log messages")
    command.set_defaults(run=run)
    return command


def _add_cache(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "list or delete the prompt states saved on disk"
    cache = commands.add_parser("cache", help=text, description=f"{text[0].upper()}{text[1:]}.")
    actions = cache.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, what in (
        ("ls", _list_states, "list states, most recently used first"),
        ("clear", _clear_states, "delete all states"),
    ):
        command = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        _add_cache_folder(_common(command, run))


def _add_cache_folder(group: argparse._ActionsContainer) -> None:
    text = "folder for prompt states (default: $EDGETUNE_CACHE, else edgetune/states in the user's cache folder)"
    group.add_argument("--cache-folder", type=Path, metavar="DIR", help=text)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling")
    for name, (kind, text) in SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    text = "end the answer before this text; may be repeated"
    group.add_argument("--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help=text)


def _add_form(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output constraint (default: the adapter's own, if it has one)")
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--schema", type=Path, metavar="FILE", help="answer in JSON that matches this JSON Schema")
    forms.add_argument("--choices", metavar="A,B", help="answer with one of these texts")
    forms.add_argument("--regex", metavar="REGEX", help="answer with a text that matches this regular expression")
    forms.add_argument("--grammar", type=Path, metavar="FILE", help="answer with a text of this Lark grammar")
    forms.add_argument("--free", action="store_true", help="do not constrain the answer")


def _add_tools(command: argparse.ArgumentParser) -> None:
    text = "offer the tools in this JSON file, a list of function definitions as in OpenAI's API"
    command.add_argument("--tools", type=Path, metavar="FILE", help=text)
    text = "with --tools: auto (default), required, none, or the name of the tool to call"
    command.add_argument("--tool-choice", metavar="CHOICE", help=text)


def _add_opening(command: argparse.ArgumentParser) -> None:
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
    text = "memory for prompt states in MB (default: 128)"
    group.add_argument("--cache-mb", type=float, metavar="N", help=text)
    _add_cache_folder(group)
    text = "decode token by token, without drafts from the adapter's draft table"
    group.add_argument("--no-drafts", action="store_true", help=text)
    group.add_argument("--no-verify", action="store_true", help="do not compare the files with their digests")


def _open(options: argparse.Namespace, **more: Any) -> Runtime:  # noqa: ANN401 - those of `Runtime.open`
    from .runtime import CACHE_MB, Runtime  # noqa: PLC0415 - load numpy and the engine only when a command needs them

    if options.cache_mb is not None and options.cache_mb < 0:
        raise UsageError(f"--cache-mb is {options.cache_mb:g}", "give 0 or more")
    return Runtime.open(
        options.bundle,
        engine=options.engine,
        threads=options.threads,
        context_length=options.context_length,
        kv=options.kv,
        repack=options.repack,
        priority=options.priority,
        verify=not options.no_verify,
        cache_mb=CACHE_MB if options.cache_mb is None else options.cache_mb,
        cache_folder=options.cache_folder,
        map_large_blocks=True,
        drafts=not options.no_drafts,
        **more,
    )


def _info(options: argparse.Namespace) -> None:
    manifest = read_manifest(options.bundle)
    if options.verify:
        verify_files(options.bundle, manifest)
    if options.json:
        print(manifest.to_json(), end="")
        return
    base = manifest.base
    print(f"bundle    {manifest.name}, {_size(manifest, manifest.files)}, context {manifest.context_length} tokens")
    types = next(iter(base.values_by_type.values()), {})
    weights = f"{base.parameters / 1e6:.0f} M parameters, {describe(base.quantization, types)}"
    print(f"base      {base.name}: {base.architecture}, {weights}, {_size(manifest, base.files.values())}")
    for entry in manifest.adapters.values():
        shapes = " and ".join(dict.fromkeys(entry.shapes.values()))
        print(f"adapter   {entry.name}: {entry.method}, {shapes}, {_size(manifest, entry.files.values())}")


def _size(manifest: Manifest, names: Iterable[str]) -> str:
    return f"{sum(manifest.files[name].bytes for name in names) / 1e6:.1f} MB"


def _generate(options: argparse.Namespace) -> None:
    prompt = _prompt(options)
    with _open(options) as runtime:
        stream = runtime.stream(prompt, adapter=adapter_choice(runtime, options.adapter), **_answer_options(options))
        show(stream, as_json=options.json)


def _classify(options: argparse.Namespace) -> None:
    prompt = _prompt(options)
    labels = None if options.labels is None else [label.strip() for label in options.labels.split(",")]
    with _open(options) as runtime:
        label, scores = runtime.classify(prompt, labels, adapter=adapter_choice(runtime, options.adapter))
    if options.json:
        print(json.dumps({"label": label, "scores": scores}, ensure_ascii=False))
        return
    for name in sorted(scores, key=scores.__getitem__, reverse=True):
        print(f"{name}\t{scores[name]:.4f}")


def _check(options: argparse.Namespace) -> None:
    from .golden import report  # noqa: PLC0415 - see _open

    with _open(options) as runtime:
        report(runtime, as_json=options.json)


def _warm(options: argparse.Namespace) -> None:
    with _open(options) as runtime:
        tokens = runtime.warm()
    if options.json:
        print(json.dumps(tokens, ensure_ascii=False))
        return
    for name, count in tokens.items():
        print(f"{name}\t{count} tokens")


def _serve(options: argparse.Namespace) -> None:
    server.run(options, partial(_open, options))


def _wyoming(options: argparse.Namespace) -> None:
    wyoming.run(options, partial(_open, options))


def _list_states(options: argparse.Namespace) -> None:
    from .states.store import StateStore, default_folder  # noqa: PLC0415 - not needed for --help

    store = StateStore(options.cache_folder or default_folder(), 0)
    entries = store.entries()
    if options.json:
        rows = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        print(json.dumps(rows, ensure_ascii=False))
        return
    for entry in entries:
        print(f"{entry.label}\t{entry.tokens} tokens\t{entry.bytes / 1e6:.1f} MB\t{entry.engine}")
    print(
        f"{len(entries)} states, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB in {store.folder}",
        file=sys.stderr,
    )


def _clear_states(options: argparse.Namespace) -> None:
    from .states.store import StateStore, default_folder  # noqa: PLC0415 - as above

    store = StateStore(options.cache_folder or default_folder(), 0)
    count = store.clear()
    print(json.dumps({"deleted": count}) if options.json else f"deleted {count} states in {store.folder}")


def _bench(options: argparse.Namespace) -> None:
    from tempfile import TemporaryDirectory  # noqa: PLC0415 - as above

    from .bench import measure, restored_ms, start_ms  # noqa: PLC0415 - see _open

    figures = measure(lambda: _open(options, disk_mb=0), lambda text: print(f"{text} ...", file=sys.stderr))
    if figures["ttft_ms"] is not None:
        print("states on disk and process start ...", file=sys.stderr)
        with TemporaryDirectory() as folder:
            options.cache_folder = Path(folder)
            with _open(options) as runtime:
                figures["ttft_ms"]["restored"] = restored_ms(runtime)
                name, engine = runtime.adapters[0], runtime.engine
            command = [sys.executable, "-m", "edgetune_runtime", "generate", str(options.bundle), "--prompt", "?"]
            command += ["--adapter", name, "--engine", engine, "--max-tokens", "1", "--cache-folder", folder]
            command += [] if options.threads is None else ["--threads", str(options.threads)]
            command += [] if options.kv is None else ["--kv", options.kv]
            command += [] if options.repack is None else ["--repack" if options.repack else "--no-repack"]
            figures["start_ms"] = start_ms(command)
    print(json.dumps(figures) if options.json else "\n".join(_lines(figures)))


def _doctor(options: argparse.Namespace) -> None:
    from .doctor import examine  # noqa: PLC0415 - as above

    if options.bundle is None and (options.calibrate or options.calibration):
        raise UsageError("--calibrate and --calibration need a bundle", "give the bundle's folder")
    manifest = None if options.bundle is None else read_manifest(options.bundle)
    found = examine(manifest)
    if manifest is not None:
        _try(options, manifest, found)
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    problems = found.pop("problems")
    print("\n".join(_lines(found)))
    print("\n".join(f"problem\t{problem}" for problem in problems) or "no problem found")


def _try(options: argparse.Namespace, manifest: Manifest, found: dict[str, Any]) -> None:
    """Add to `found` what a trial of the bundle finds, and store what it measures."""
    from .sizing.calibration import read_calibration, write_calibration  # noqa: PLC0415
    from .sizing.needs import needs_of_bundle, with_options  # noqa: PLC0415
    from .sizing.trial import try_bundle  # noqa: PLC0415

    needs = None
    if manifest.task == GENERATION:
        try:
            needs = needs_of_bundle(options.bundle, context_length=options.context_length, engine=options.engine)
        except EdgetuneError as error:
            found["bundle"]["refused"] = str(error)
            found["problems"].append(f"refused: {error}")
            return
        needs = with_options(needs, kv=options.kv, cache_mb=options.cache_mb)
    known = None
    if options.calibration is not None and needs is not None:
        known = read_calibration(options.calibration, needs)
    repacks = frozenset() if options.repack is False else repacked_types(found["instructions"])
    trial = try_bundle(lambda: _open(options, disk_mb=0), needs, known=known, repacks=repacks)
    found["bundle"] |= trial.found
    found["problems"] += trial.problems
    if options.calibrate is None:
        return
    if trial.figures is None or needs is None:
        reason = trial.found.get("refused") or "it is not a bundle for text generation"
        raise IncompatibleError(f"nothing to calibrate with: {reason}", "give a bundle that runs here")
    machine = {"processor": found["processor"], "board": found["board"], "threads": trial.found["threads"]}
    write_calibration(options.calibrate, needs, trial.figures, machine)
    found["calibration"] = str(options.calibrate)


def _lines(figures: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}\t{value:.1f}" if isinstance(value, float) else f"{prefix}{name}\t{value}"


def _chat(options: argparse.Namespace) -> None:
    with _open(options) as runtime:
        runtime.session()  # fails for a bundle that cannot chat, before the first line is read
        Conversation(runtime, options.adapter, _answer_options(options), as_json=options.json).run()


def _prompt(options: argparse.Namespace) -> str:
    text: str = options.prompt
    return sys.stdin.read().removesuffix("\n") if text == "-" else text


def _answer_options(options: argparse.Namespace) -> dict[str, Any]:
    """The answer options on the command line; the others have the defaults of `AnswerOptions`."""
    given = vars(options)
    found: dict[str, Any] = {name: given[name] for name in (*SAMPLING, "stop", "logprobs") if name in given}
    if "logprobs" in found and not options.json:
        raise UsageError("--logprobs is given without --json", "add --json")
    files = {name: _read(given[name]) for name in ("schema", "grammar") if given[name] is not None}
    choices = {} if options.choices is None else {"choices": [text.strip() for text in options.choices.split(",")]}
    tools = {} if given.get("tools") is None else {"tools": _read_json(options.tools)}
    found |= {"tool_choice": given.get("tool_choice"), "regex": options.regex, "free": options.free}
    return {**found, **files, **choices, **tools}


def _read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}", "give a list of tools") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise NotFoundError(f"cannot read {path}: {reason}", "give a text file") from error
