"""Read a request's body within limits, and stop work for a client that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from .fields import read_object
from .large_bodies import LARGE_BYTES
from .problems import ClientGoneError, RequestError
from .settings import ServerLimits

T = TypeVar("T")

_MAX_VALUES = 100_000
"""JSON values in a body, counted by its commas and opening brackets, also those in texts."""


class BodyReader:
    """Reads the bodies of requests. Large ones are parsed one after another, beside the event loop."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._parsing = asyncio.Semaphore(1)

    async def read(self, request: Request, parse: Callable[[Mapping[str, Any]], T]) -> T:
        """What `parse` makes of the JSON object in a request's body.

        RequestError if it is not one, or is too large or too slow; ClientGoneError if the client disconnects.
        """
        data = await _read(request, self._limits)
        if len(data) <= LARGE_BYTES:
            return parse(read_object(data))
        if sum(data.count(sign) for sign in (b",", b"[", b"{")) > _MAX_VALUES:
            raise RequestError(f"the body has more than {_MAX_VALUES} values", "send fewer")
        async with self._parsing:
            return await until_disconnect(request.receive, asyncio.to_thread(lambda: parse(read_object(data))))


async def _read(request: Request, limits: ServerLimits) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(f"Content-Encoding {encoding!r} is not supported", "send plain JSON", status=415)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise _too_large(limits)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.client_s):
            async for part in request.stream():
                data += part
                if len(data) > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError as error:
        message = f"the body did not arrive within {limits.client_s:g} s"
        raise RequestError(message, "send it faster", status=408) from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return bytes(data)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or cancel it and raise ClientGoneError once the client disconnects."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limits: ServerLimits) -> RequestError:
    return RequestError(f"the body is larger than {limits.body_bytes} bytes", "send less", status=413)
