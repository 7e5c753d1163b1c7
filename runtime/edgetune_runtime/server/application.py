"""The ASGI application: the routes of both APIs, health, and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edgetune_runtime import __version__

from . import corrections, ollama_answers, ollama_requests, openai_answers, openai_requests, page
from .answering import Answering
from .connection import BodyReader, until_disconnect
from .error_responses import ErrorResponses
from .guard import Guard
from .large_bodies import LargeBodies
from .metrics import CONTENT_TYPE
from .metrics_middleware import MetricsMiddleware
from .ollama_answers import OllamaReply
from .openai_answers import ChatShape, CompletionShape, OpenAIReply
from .problems import RequestError, error_response, json_response
from .responses_answers import ResponsesReply
from .responses_requests import responses_request
from .settings import ServerLimits
from .streaming import NDJSON, LineResponse, line

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
Reply = OpenAIReply | OllamaReply | ResponsesReply


def application(answering: Answering) -> ASGIApp:
    """The application that answers with `answering`."""
    bodies = BodyReader(answering.limits)
    own = [*_common(answering), *corrections.routes(answering, bodies)]
    routes = [*own, *_OpenAI(answering, bodies).routes(), *_Ollama(answering, bodies).routes()]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(MetricsMiddleware, metrics=answering.metrics),
            Middleware(Guard, access=answering.serving.access),
            Middleware(ErrorResponses),
            Middleware(LargeBodies),
        ],
        exception_handlers={HTTPException: _http_error},
    )


def _common(answering: Answering) -> list[Route]:
    async def health(_: Request) -> Response:
        return json_response({"status": "ok", "bundle": answering.bundle.digest})

    async def ready(_: Request) -> Response:
        status = "stopping" if answering.queue.stopping else "warming" if answering.is_warming else "ready"
        return json_response({"status": status}, 200 if status == "ready" else 503)

    async def metrics(_: Request) -> Response:
        return Response(answering.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return [*page.routes(answering), Route("/healthz", health), Route("/readyz", ready), Route("/metrics", metrics)]


class _Api:
    """The routes of one API."""

    def __init__(self, answering: Answering, bodies: BodyReader) -> None:
        self._answering, self._bodies = answering, bodies

    async def _read(self, request: Request, parse: Callable[..., T], *limits: ServerLimits) -> T:
        """What `parse` makes of the body, with the models of the bundle and `limits`."""
        return await self._bodies.read(request, lambda body: parse(body, self._answering.models, *limits))

    def _answers(self, parse: Callable[..., T], reply_to: Callable[[T], Reply]) -> Endpoint:
        """Answers the request that `parse` makes of a body, as `reply_to` writes it."""

        async def endpoint(request: Request) -> Response:
            reply = reply_to(await self._read(request, parse, self._answering.limits))
            if not reply.request.prompts:
                return json_response(reply.whole([]))
            if reply.request.streams:
                return LineResponse(reply.lines(self._answering), reply.media_type)
            answers = await until_disconnect(request.receive, self._answering.answers(reply.request))
            return json_response(reply.whole(answers), headers=openai_answers.sureness_headers(answers))

        return endpoint


class _OpenAI(_Api):
    def routes(self) -> list[Route]:
        chat, text = partial(OpenAIReply, shape=ChatShape()), partial(OpenAIReply, shape=CompletionShape())
        return [
            Route("/v1/models", self._list),
            Route("/v1/models/{model}", self._show),
            Route("/v1/chat/completions", self._answers(openai_requests.chat_request, chat), methods=["POST"]),
            Route("/v1/completions", self._answers(openai_requests.completion_request, text), methods=["POST"]),
            Route("/v1/responses", self._answers(responses_request, ResponsesReply), methods=["POST"]),
            Route("/v1/embeddings", self._embed, methods=["POST"]),
            Route("/v1/classify", self._classify, methods=["POST"]),
        ]

    async def _list(self, _: Request) -> Response:
        return json_response(openai_answers.model_list(self._answering.models))

    async def _show(self, request: Request) -> Response:
        info = self._answering.models.info(request.path_params["model"])
        return json_response(openai_answers.model_object(self._answering.models, info))

    async def _embed(self, request: Request) -> Response:
        model, texts, as_base64 = await self._read(request, openai_requests.embedding_request)
        vectors, tokens = await until_disconnect(request.receive, self._answering.embeddings(texts))
        return json_response(openai_answers.embedding_list(model, vectors, tokens, as_base64=as_base64))

    async def _classify(self, request: Request) -> Response:
        asked = await self._read(request, openai_requests.classify_request)
        found = await until_disconnect(request.receive, self._answering.labels(asked))
        return json_response(openai_answers.label_list(asked, found), headers=openai_answers.sureness_headers(found))


class _Ollama(_Api):
    def routes(self) -> list[Route]:
        chat, text = partial(OllamaReply, is_chat=True), partial(OllamaReply, is_chat=False)
        return [
            Route("/api/version", self._version),
            Route("/api/tags", self._list),
            Route("/api/ps", self._loaded),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/pull", self._pull, methods=["POST"]),
            Route("/api/chat", self._answers(ollama_requests.chat_request, chat), methods=["POST"]),
            Route("/api/generate", self._answers(ollama_requests.generate_request, text), methods=["POST"]),
            Route("/api/embed", self._embed, methods=["POST"]),
            Route("/api/embeddings", self._embed_one, methods=["POST"]),
        ]

    async def _version(self, _: Request) -> Response:
        return json_response({"version": ollama_answers.VERSION, "edgetune": __version__})

    async def _list(self, _: Request) -> Response:
        return json_response(ollama_answers.model_list(self._answering.models))

    async def _loaded(self, _: Request) -> Response:
        length = self._answering.runtime.context_length
        return json_response(ollama_answers.loaded_list(self._answering.models, length))

    async def _show(self, request: Request) -> Response:
        info = self._answering.models.info(await self._bodies.read(request, ollama_requests.model_name))
        length = self._answering.runtime.context_length
        return json_response(ollama_answers.model_facts(self._answering.models, info, length))

    async def _pull(self, request: Request) -> Response:
        body = await self._bodies.read(request, dict)
        self._answering.models.adapters(ollama_requests.model_name(body))
        if body.get("stream") is False:
            return json_response({"status": "success"})
        lines = [line({"status": status}) for status in ("pulling manifest", "success")]
        return Response(b"".join(lines), media_type=NDJSON)

    async def _embed(self, request: Request) -> Response:
        model, texts = await self._read(request, ollama_requests.embed_request)
        vectors, tokens = await until_disconnect(request.receive, self._answering.embeddings(texts))
        return json_response({"model": model, "embeddings": vectors, "prompt_eval_count": tokens})

    async def _embed_one(self, request: Request) -> Response:
        text = await self._read(request, ollama_requests.old_embed_request)
        (vector,), _ = await until_disconnect(request.receive, self._answering.embeddings([text]))
        return json_response({"embedding": vector})


async def _http_error(request: Request, error: Exception) -> Response:
    """An unknown path or a wrong method, in the shape of the API."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        problem = RequestError(f"no route {path}", "see the API's documentation", status=404)
    else:
        allowed = (error.headers or {}).get("Allow", "another method")
        problem = RequestError(f"{method} {path} is not possible", f"use {allowed}", status=error.status_code)
    response = error_response(problem, path)
    response.headers.update(error.headers or {})
    return response
