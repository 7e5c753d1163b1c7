"""A Starlette app that streams answers from one AsyncRuntime; a client that leaves frees its context at once.

python examples/web/starlette_app.py build/smart-home
curl --no-buffer --data "turn off the lamp in the hall" localhost:8000/command
"""

import sys
from collections.abc import AsyncIterator

import uvicorn
from edgetune_runtime import AsyncRuntime, BusyError, EdgetuneError, NotFoundError, Runtime, UsageError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

STATUS = {BusyError: 503, NotFoundError: 404, UsageError: 400}


def create_app(runtime: AsyncRuntime) -> Starlette:
    """An app whose POST /ADAPTER answers the prompt in its body; `runtime` stays open as long as the app runs."""

    async def answer(request: Request) -> StreamingResponse:
        prompt = (await request.body()).decode(errors="replace")
        stream = runtime.stream(prompt, adapter=request.path_params["adapter"], max_tokens=200)
        # Wait for the first piece, so that an error can still set the status.
        first = await anext(stream, "")

        async def pieces() -> AsyncIterator[str]:
            async with stream:
                yield first
                async for piece in stream:
                    yield piece

        return StreamingResponse(pieces(), media_type="text/plain")

    async def refuse(_request: Request, error: Exception) -> PlainTextResponse:
        status = next((STATUS[kind] for kind in STATUS if isinstance(error, kind)), 500)
        return PlainTextResponse(f"{error}\n", status)

    routes = [Route("/{adapter}", answer, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={EdgetuneError: refuse}, max_body_size=100_000)


if __name__ == "__main__":
    with Runtime.open(sys.argv[1]) as opened:
        uvicorn.run(create_app(AsyncRuntime(opened)))
