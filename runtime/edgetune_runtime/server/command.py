"""`edgetune-run serve`: its options, and what is refused before the bundle is opened."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_runtime.answer_log.log import MAX_BYTES, AnswerLog
from edgetune_runtime.errors import MissingLibraryError, NotFoundError, UsageError, importing

from .settings import Access, ServerLimits, host_of

if TYPE_CHECKING:
    from edgetune_runtime.bundle import Manifest
    from edgetune_runtime.inference.runtime import Runtime

_LOG = logging.getLogger(__name__)

_SHORTEST_KEY = 16
_ORIGIN = re.compile(r"[A-Za-z][\w+.-]*://[^\s/?#@*]+", re.ASCII)
"""Apps have schemes of their own, such as app://obsidian.md."""
_LIMITS = {
    "body_bytes": "largest request body in bytes",
    "answer_tokens": "most tokens of an answer",
    "answers": "most answers to one request (n)",
    "waiting": "most requests that wait for others; more get status 503",
    "request_s": "most seconds for a request, waiting included; one that had to wait has a quarter more",
    "client_s": "seconds after which a client is dropped that sends no request or does not read its answer",
    "connections": "most open connections",
    "connections_per_address": "most open connections from one IP address, apart from this machine's",
    "grace_s": "seconds that running answers have to finish when the server stops",
}


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `serve`, apart from those that say how the bundle is opened."""
    group = command.add_argument_group("serving")
    text = "address to listen on (default: %(default)s); one that other machines reach needs a key"
    group.add_argument("--host", default="127.0.0.1", help=text)
    group.add_argument("--port", type=int, default=8080, help="port; 0 takes a free one (default: %(default)s)")
    text = "file of API keys, one per line; clients send one as Authorization: Bearer KEY"
    keys = group.add_mutually_exclusive_group()
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help=text)
    text = "let everyone who can reach the server use it"
    keys.add_argument("--no-api-key", action="store_true", help=text)
    text = "also answer requests to this host name; may be repeated"
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    text = "let web pages of this origin, such as https://example.org, use the server; may be repeated"
    group.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=text)
    text = "compute the states of all fixed prompts at the start, and report 503 at /readyz until they are there"
    text += " (default: what the bundle says)"
    group.add_argument("--warm", action=argparse.BooleanOptionalAction, help=text)
    text = (
        "add a model NAME whose chats FUNCTION(messages, tools) of a Python module rewrites to an adapter's prompt; "
        "may be repeated"
    )
    group.add_argument("--rewrite", action="append", default=[], metavar="NAME=MODULE:FUNCTION", help=text)
    text = "folder in which modules of --rewrite are looked for (default: the current one)"
    group.add_argument("--app-dir", type=Path, default=Path(), metavar="DIR", help=text)
    text = "print a line for each request to standard error: method, path, status, time"
    group.add_argument("--log-requests", action="store_true", help=text)
    text = "write prompts, answers of one adapter and their corrections to FILE, for `edgetune learn`"
    group.add_argument("--log-answers", type=Path, metavar="FILE", help=text)
    text = "replace what this regular expression finds in the texts of --log-answers; may be repeated"
    group.add_argument("--redact", action="append", default=[], metavar="REGEX", help=text)
    text = "answers that are computed side by side (default: what fits in a quarter of the free memory, at most 4)"
    group.add_argument("--contexts", type=int, metavar="N", help=text)
    limits = command.add_argument_group("limits")
    text = "most bytes of --log-answers, with the file before it, FILE.1 (default: %(default)s)"
    limits.add_argument("--max-log-bytes", type=int, default=MAX_BYTES, metavar="N", help=text)
    for field in fields(ServerLimits):
        flag, kind = f"--max-{field.name.replace('_', '-')}", type(field.default)
        text = f"{_LIMITS[field.name]} (default: {field.default})"
        limits.add_argument(flag, dest=field.name, type=kind, default=field.default, metavar="N", help=text)


def run(options: argparse.Namespace, open_bundle: Callable[..., AbstractContextManager[Runtime]]) -> None:
    """Serve the bundle until the process is told to stop.

    Raises UsageError for a host that others can reach without a key, or a port in use, before the bundle is opened.
    """
    with importing("serving needs", '"edgetune-runtime[server]"'):
        from .answering import Serving  # noqa: PLC0415 - only `serve` needs the extra
        from .binding import bind, can_be_reached, url_of  # noqa: PLC0415
        from .listening import serve  # noqa: PLC0415
        from .metrics_middleware import LOG  # noqa: PLC0415
        from .rewriting import Rewriter  # noqa: PLC0415
    from edgetune_runtime.decoding.library import require_for  # noqa: PLC0415 - it imports numpy

    if options.log_requests:
        LOG.setLevel(logging.INFO)
    limits = _limits(options)
    access = Access(_keys(options.api_key_file), _hosts(options.allow_host), _origins(options.allow_origin))
    if not access.keys and not options.no_api_key and can_be_reached(options.host):
        message = f"others can reach {options.host}, and no key is set"
        raise UsageError(message, "give --api-key-file FILE, or --no-api-key to let everyone use the server")
    rewriters = [Rewriter.load(spec, options.app_dir.resolve()) for spec in options.rewrite]
    with bind(options.host, options.port) as listening, open_bundle(contexts=options.contexts) as runtime:
        try:
            require_for(runtime.manifest.adapters.values())
        except MissingLibraryError as error:
            _LOG.warning("requests to adapters whose answers are constrained will fail: %s", error)
        url = url_of(listening)

        def ready(_: Callable[[], None]) -> None:
            line = (
                json.dumps({"url": url, "pid": os.getpid()}) if options.json else f"serving {options.bundle} at {url}"
            )
            print(line, flush=True)

        warms = runtime.manifest.warms if options.warm is None else options.warm
        serve(runtime, listening, Serving(access, limits, warms, rewriters, _log(options, runtime.manifest)), ready)
    if not options.json:
        print("stopped", file=sys.stderr)


def _log(options: argparse.Namespace, manifest: Manifest) -> AnswerLog | None:
    if options.log_answers is None:
        if options.redact:
            raise UsageError("--redact is given without --log-answers", "give both, or neither")
        return None
    return AnswerLog(options.log_answers, manifest, max_bytes=options.max_log_bytes, redact=options.redact)


def _limits(options: argparse.Namespace) -> ServerLimits:
    values = {field.name: getattr(options, field.name) for field in fields(ServerLimits)}
    # Nothing is smaller than NaN.
    wrong = [name for name, value in values.items() if not value >= (0 if name in ("waiting", "grace_s") else 1)]
    if wrong:
        flags = ", ".join(f"--max-{name.replace('_', '-')} {values[name]}" for name in wrong)
        raise UsageError(f"too small: {flags}", "give a larger number")
    return ServerLimits(**values)


def _keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"cannot read the keys in {path}: {error}", "give a text file") from error
    if not lines or min(map(len, lines)) < _SHORTEST_KEY:
        message = f"{path} has no key, or one of fewer than {_SHORTEST_KEY} characters"
        raise UsageError(message, "make one: openssl rand -hex 32")
    if not all(map(str.isascii, lines)):
        number = next(number for number, line in enumerate(lines, 1) if not line.isascii())
        raise UsageError(f"key {number} of {path} is not ASCII", "make one: openssl rand -hex 32")
    return tuple(lines)


def _hosts(hosts: list[str]) -> tuple[str, ...]:
    for host in hosts:
        if not host or host_of(host) != host.lower():
            raise UsageError(f"host {host!r} is not a name", "give one without scheme and port, such as board.lan")
    return tuple(hosts)


def _origins(origins: list[str]) -> tuple[str, ...]:
    for origin in origins:
        if not (origin.isascii() and _ORIGIN.fullmatch(origin)):
            remedy = "give one as browsers send it, such as https://example.org or https://xn--mnchen-3ya.de"
            raise UsageError(f"origin {origin!r} is not a scheme and host", remedy)
    return tuple(map(_as_sent, origins))


def _as_sent(origin: str) -> str:
    """An origin as browsers send it: in small letters, without the port that its scheme has by default."""
    origin = origin.lower()
    for scheme, port in (("http://", ":80"), ("https://", ":443")):
        if origin.startswith(scheme):
            origin = origin.removesuffix(port)
    return origin
