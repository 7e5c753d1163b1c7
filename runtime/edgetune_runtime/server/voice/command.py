"""`edgetune-run wyoming`: its options, and what is refused before the bundle is opened."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edgetune_runtime.bundle import AUTO, Manifest, read_manifest
from edgetune_runtime.errors import UsageError, importing
from edgetune_runtime.limits import CallLimits
from edgetune_runtime.server.binding import bind, can_be_reached, url_of

if TYPE_CHECKING:
    from edgetune_runtime.inference.runtime import Runtime


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `wyoming`, apart from those that say how the bundle is opened."""
    group = command.add_argument_group("serving")
    text = "address to listen on, as tcp://HOST:PORT; port 0 takes a free one (default: %(default)s)"
    group.add_argument("--uri", default="tcp://127.0.0.1:10500", metavar="URI", help=text)
    text = "let everyone who can reach the service use it; needed for other machines, as the protocol has no keys"
    group.add_argument("--no-api-key", action="store_true", help=text)
    text = "adapter that answers, or auto for the one that the router chooses (default: the only one of the bundle)"
    group.add_argument("--adapter", metavar="NAME", help=text)
    text = "languages that it understands, comma-separated (default: %(default)s)"
    group.add_argument("--languages", default="en", metavar="A,B", help=text)
    text = "maximum length of an answer in tokens (default: %(default)s)"
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help=text)
    text = "seconds after which an answer ends with what it has (default: %(default)s)"
    group.add_argument("--deadline-s", type=float, default=20.0, metavar="N", help=text)


def run(options: argparse.Namespace, open_bundle: Callable[..., AbstractContextManager[Runtime]]) -> None:
    """Answer voice assistants until the process is told to stop.

    Raises UsageError for a wrong URI, languages or limit, a host that others can reach without --no-api-key, or a port
    in use.
    """
    with importing("the Wyoming service needs", '"edgetune-runtime[wyoming]"'):
        from .service import WyomingService, serve  # noqa: PLC0415 - only `wyoming` needs the extra
    from edgetune_runtime.decoding.library import require_for  # noqa: PLC0415 - it imports numpy
    from edgetune_runtime.inference.asynchronous import AsyncRuntime  # noqa: PLC0415 - as above
    from edgetune_runtime.text.sampling import Sampling  # noqa: PLC0415 - as above

    # Now, and not at each transcript.
    Sampling(max_tokens=options.max_tokens)
    CallLimits(options.deadline_s)
    adapter = _adapter(options.adapter, read_manifest(options.bundle))
    host, port = _address(options.uri)
    if can_be_reached(host) and not options.no_api_key:
        message = f"others can reach {host}, and the protocol has no keys"
        raise UsageError(message, "give --no-api-key to let everyone use the service")
    languages = tuple(name.strip() for name in options.languages.split(","))
    if not all(languages):
        raise UsageError(f"--languages {options.languages!r} has an empty name", "give names such as en,de")

    with bind(host, port) as listening, open_bundle() as runtime:
        manifest = runtime.manifest
        require_for(entry for entry in manifest.adapters.values() if adapter in (entry.name, AUTO))
        service = WyomingService(AsyncRuntime(runtime), adapter, languages, options.max_tokens, options.deadline_s)
        uri = url_of(listening, "tcp")
        line = json.dumps({"uri": uri, "pid": os.getpid()}) if options.json else f"serving {options.bundle} at {uri}"
        serve(service, listening, lambda: print(line, flush=True))


def _adapter(name: str | None, manifest: Manifest) -> str | None:
    if name == AUTO and manifest.router is not None:
        return name
    if name is not None:
        return manifest.adapter(name).name
    if len(manifest.adapters) > 1:
        names = ", ".join(manifest.adapters)
        raise UsageError(f"bundle {manifest.name!r} has several adapters", f"give --adapter, one of: {names}")
    return next(iter(manifest.adapters), None)


def _address(uri: str) -> tuple[str, int]:
    try:
        parts = urlsplit(uri)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path.strip("/"):
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise UsageError(f"--uri {uri!r} is not an address", "give tcp://HOST:PORT")
