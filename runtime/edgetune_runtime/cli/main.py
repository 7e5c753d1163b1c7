"""The command line: commands, options and exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from edgetune_runtime import __version__
from edgetune_runtime.bundle.signatures import read_signed_manifest
from edgetune_runtime.errors import UsageError, error_to_report
from edgetune_runtime.processes.interrupts import end_on_interrupt
from edgetune_runtime.processes.streams import flush_output, prepare_streams
from edgetune_runtime.server import command as server
from edgetune_runtime.server.voice import command as wyoming
from edgetune_runtime.update import command as updating
from edgetune_runtime.wording import printable

from . import adapters, answers, machine
from .conversation import PROGRAM
from .log_lines import LineFormatter, RateFilter
from .options import (
    add_cache_folder,
    add_form,
    add_min_confidence,
    add_opening,
    add_sampling,
    add_tools,
    add_unsure,
    open_runtime,
)

_LOGGERS = ("edgetune_runtime", "uvicorn.error", "asyncio")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, and takes no abbreviations, which may be options of other commands."""

    def __init__(self, prog: str, **options: Any) -> None:  # noqa: ANN401 - those of argparse
        super().__init__(prog, **options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{PROGRAM}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 or the exit code of the error, which is printed to standard error in one line."""
    end_on_interrupt()
    prepare_streams()
    options = make_parser().parse_args(arguments)
    try:
        with _logging(debug=options.debug):
            if getattr(options, "trusted_keys", None) is not None and options.bundle is not None:
                # Some commands read the manifest before they open the bundle.
                read_signed_manifest(options.bundle, options.trusted_keys)
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        flush_output()  # the reader closed the pipe
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            traceback.print_exc()
        return _fail(error)
    return 0


@contextmanager
def _logging(*, debug: bool) -> Iterator[None]:
    """Write warnings of edgetune and its servers, or with `debug` all log messages, to standard error in the block."""
    loggers, handler = [logging.getLogger(name) for name in _LOGGERS], logging.StreamHandler()
    if not debug:
        # What matters in these logs is raised as an error.
        handler.addFilter(lambda record: not record.name.endswith(("llama_cpp", "onnxruntime")))
    handler.addFilter(RateFilter())
    handler.setFormatter(LineFormatter(f"{PROGRAM}: %(levelname)s: %(message)s"))
    before = loggers[0].level
    loggers[0].setLevel(logging.DEBUG if debug else logging.WARNING)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        loggers[0].setLevel(before)


def _fail(error: BaseException) -> int:
    flush_output()
    reported = error_to_report(error)
    print(f"{PROGRAM}: {printable(' '.join(str(reported).split()))}", file=sys.stderr)
    return reported.exit_code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = _Parser(PROGRAM, description="Run an edgetune bundle: one base, and adapters that switch in microseconds.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = partial(_command, commands)
    info = add("info", answers.info, "show what is in a bundle and how it would be opened, without loading it")
    info.add_argument("--verify", action="store_true", help="also compare every file with its digest")
    generate = add("generate", answers.generate, "answer one prompt and print the text as it is generated")
    classify = add("classify", answers.classify, "print the labels for a prompt with their probabilities")
    chat = add("chat", answers.chat, "chat with the base and its adapters")
    bench = add("bench", machine.bench, "measure load time, switching, time to first token, speed and memory")
    check = add("check", answers.check, "compare the answers on this machine with those that the build stored")
    text = "run without network or root privileges, with limits: for a bundle of unknown origin (Linux)"
    check.add_argument("--confined", action="store_true", help=text)
    warm = add("warm", answers.warm, "compute the states of the adapters' fixed prompts and save them to disk")
    serve = add("serve", _serve, "answer requests of OpenAI's and Ollama's APIs over HTTP")
    voice = add("wyoming", _wyoming, "answer voice assistants over the Wyoming protocol")
    text = "show the cores, memory and libraries of this machine, and what slows answers down"
    doctor = commands.add_parser("doctor", help=text, description=f"{text[0].upper()}{text[1:]}.")
    doctor.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="also try the bundle in this folder")
    text = "write what this machine sustains with the bundle to FILE, for `edgetune devices fit --calibration FILE`"
    doctor.add_argument("--calibrate", type=Path, metavar="FILE", help=text)
    text = "predict with the figures in FILE (default: with the memory bandwidth measured here)"
    doctor.add_argument("--calibration", type=Path, metavar="FILE", help=text)
    _common(doctor, machine.doctor)
    text = "install the newest bundle of a signed repository, or go back to the previous version"
    update = commands.add_parser("update", help=text, description=f"{text[0].upper()}{text[1:]}.")
    updating.add_options(_common(update, updating.run))
    _add_cache(commands)
    adding = _add_adapters(commands)
    for command in (generate, classify):
        command.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; - reads standard input")
    for command in (generate, classify, chat):
        text = "answer with this adapter at SCALE (default: the bundle's), or with the router's choice (auto); may be "
        text += "repeated; omit it for the plain base"
        command.add_argument("--adapter", action="append", default=[], metavar="NAME[=SCALE]", help=text)
    text = "with --json: print each token's log-probability, and those of the N likeliest tokens at its place (0 to 20)"
    generate.add_argument("--logprobs", type=int, default=argparse.SUPPRESS, metavar="N", help=text)
    classify.add_argument("--labels", metavar="A,B,C", help="comma-separated labels (default: the adapter's)")
    text = "compute the probabilities of all labels, not only of those that might be the most likely"
    classify.add_argument("--exact", action="store_true", help=text)
    for command in (generate, chat):
        add_sampling(command)
    add_form(generate)
    add_tools(generate)
    for command in (generate, chat):
        add_unsure(command)
    add_min_confidence(classify)
    add_form(chat)
    server.add_options(serve)
    wyoming.add_options(voice)
    for command in (generate, chat, serve, voice):
        add_opening(command, is_answering=True)
    for command in (info, classify, bench, check, warm, doctor, adding):
        add_opening(command, is_answering=False)
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
    text = "list the prompt states saved on disk, or delete them and past answers"
    cache = commands.add_parser("cache", help=text, description=f"{text[0].upper()}{text[1:]}.")
    actions = cache.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, effect in (
        ("ls", machine.list_states, "list states, most recently used first"),
        ("clear", machine.clear_states, "delete all states and past answers"),
    ):
        command = actions.add_parser(name, help=effect, description=f"{effect[0].upper()}{effect[1:]}.")
        add_cache_folder(_common(command, run))


def _add_adapters(commands: argparse._SubParsersAction[_Parser]) -> argparse.ArgumentParser:
    """Returns the parser of `adapters add`, which opens the bundle to check the adapter."""
    text = "list the adapters of a bundle, add or remove one"
    group = commands.add_parser("adapters", help=text, description=f"{text[0].upper()}{text[1:]}.")
    actions = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _command(actions, "ls", adapters.list_adapters, "list adapters with their methods, shapes and sizes")
    text = "check an adapter of another bundle on the same base, and copy it into this bundle"
    adding = _command(actions, "add", adapters.add, text)
    text = "a bundle with the adapter; its base may be left out"
    adding.add_argument("source", type=Path, metavar="SOURCE", help=text)
    text = "the adapter to add, if the bundle has several"
    adding.add_argument("--adapter", metavar="NAME", help=text)
    removing = _command(actions, "remove", adapters.remove, "remove an adapter and its files")
    removing.add_argument("name", metavar="NAME", help="the adapter to remove")
    return adding


def _serve(options: argparse.Namespace) -> None:
    server.run(options, partial(open_runtime, options))


def _wyoming(options: argparse.Namespace) -> None:
    wyoming.run(options, partial(open_runtime, options))
