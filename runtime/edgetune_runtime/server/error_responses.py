"""Middleware that turns every error into a response in the shape of the API."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import ClientGoneError, error_response, failure


class ErrorResponses:
    """Answers with the error if anything raises one; it has to be inside `Guard`, which adds the CORS headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Raises ClientGoneError, and an error after the response has begun."""
        has_started = False

        async def noting(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientGoneError:
            raise
        except Exception as error:
            response = error_response(failure(error), scope["path"])
            if has_started:
                raise
            await response(scope, receive, send)
