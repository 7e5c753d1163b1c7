"""The page at `/` to try a bundle in a browser, and the facts of the bundle that it shows."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from edgetune_runtime.bundle import AdapterEntry
from edgetune_runtime.threads.machine import resident_mb

from .answering import Answering
from .problems import json_response

FACTS = "/edgetune/bundle"


def routes(answering: Answering) -> list[Route]:
    """The page, and the facts that it fetches."""

    async def home(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            text, headers = _page()
            return HTMLResponse(text, headers=headers)
        # Clients of Ollama look here whether a server runs.
        return PlainTextResponse(f"edgetune-run serves {answering.models.manifest.name}\n")

    async def facts(_: Request) -> Response:
        return json_response(facts_of(answering))

    return [Route("/", home), Route(FACTS, facts)]


def facts_of(answering: Answering) -> dict[str, Any]:
    """What the page shows of the bundle, as JSON values; `models` are those to choose from, the base first.

    Each has a `kind` (`base`, `adapter` or `rewriter`); only an adapter has facts of its own.
    """
    models, runtime = answering.models, answering.runtime
    base, adapters = models.manifest.base, models.manifest.adapters
    return {
        "name": models.manifest.name,
        "base": base.name,
        "parameters": base.parameters,
        "quantization": base.quantization,
        "engine": models.engine,
        "context_length": runtime.context_length,
        "resident_mb": resident_mb(),
        "logs_answers": answering.log is not None,
        "models": [
            {"name": info.name, "kind": info.kind}
            | (_adapter_facts(adapters[info.name], models.engine) if info.kind == "adapter" else {})
            for info in models.listed.values()
        ],
    }


def _adapter_facts(entry: AdapterEntry, engine: str) -> dict[str, Any]:
    ranks = sorted(entry.modules_by_rank)
    training = entry.training
    return {
        "method": entry.method,
        "ranks": [ranks[0], ranks[-1]] if ranks else None,
        "system": entry.system,
        "metric": entry.metric,
        "labels": list(entry.labels),
        "output": next((kind for kind in entry.output or {} if kind != "spacing"), None),
        "parity": entry.parity.get(engine),
        "val_loss": training.get("val_loss"),
        "draft_tokens_per_step": training.get("draft_tokens_per_step"),
        "history": training.get("history", []),
    }


@cache
def _page() -> tuple[str, dict[str, str]]:
    """The page, and headers by which a browser runs its own script and style only."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script, style = (_digest(text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return text, {**headers, "Referrer-Policy": "no-referrer"}


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
