"""The metrics of the server, in Prometheus' text format."""

from __future__ import annotations

import time
from contextlib import suppress

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from edgetune_runtime.inference.adapter_choice import Adapters
from edgetune_runtime.inference.answer import Answer
from edgetune_runtime.inference.classification import Classification

from .answer_queue import AnswerQueue

__all__ = ["CONTENT_TYPE", "Metrics"]

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_SWITCH_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 1e-2, 1e-1, 1.0)


_MAX_ADAPTERS = 100
"""Each adapter has 52 lines, and writing the text keeps other requests waiting."""


class Metrics:
    """The counters of one server. `adapter` is an adapter's name, `base`, `several`, or `other` after 100 adapters."""

    def __init__(self, queue: AnswerQueue) -> None:
        self._registry = registry = CollectorRegistry()
        # Resident memory, CPU time and open files of this process, on Linux.
        ProcessCollector(registry=registry)
        text = "Requests by route and HTTP status; 499 is a client that disconnected"
        self._requests = Counter("edgetune_requests", text, ["route", "status"], registry=registry)
        running = Gauge("edgetune_requests_running", "Requests that are being answered", registry=registry)
        running.set_function(lambda: queue.running)
        waiting = Gauge("edgetune_requests_waiting", "Requests that wait for others", registry=registry)
        waiting.set_function(lambda: queue.waiting)

        self._adapters: set[str] = set()
        self._by_adapter: list[Counter | Histogram] = []

        def by_adapter(name: str, text: str) -> Counter:
            counter = Counter(name, text, ["adapter"], registry=registry)
            self._by_adapter.append(counter)
            return counter

        self._prompt_tokens = by_adapter("edgetune_prompt_tokens", "Tokens of prompts")
        self._reused_tokens = by_adapter("edgetune_prompt_tokens_reused", "Tokens of prompts from cached states")
        self._answer_tokens = by_adapter("edgetune_answer_tokens", "Tokens of answers")
        self._draft_tokens = by_adapter("edgetune_draft_tokens", "Tokens of drafts that were verified")
        self._accepted_tokens = by_adapter("edgetune_draft_tokens_accepted", "Tokens of drafts that were right")
        self._forced_tokens = by_adapter("edgetune_answer_tokens_forced", "Tokens that an output constraint forced")
        self._hits = by_adapter("edgetune_state_hits", "Answers whose prompt reused a cached state")
        self._misses = by_adapter("edgetune_state_misses", "Answers whose prompt was computed from its beginning")
        text = "Time from the arrival of a request to the first piece of its answer"
        self._ttft = Histogram("edgetune_ttft_seconds", text, ["adapter"], buckets=_TTFT_S, registry=registry)
        text = "Time to switch to the adapters of an answer"
        self._switch = Histogram("edgetune_switch_seconds", text, ["adapter"], buckets=_SWITCH_S, registry=registry)
        text = "Probability that an answer is right, of answers that have one"
        self._confidence = Histogram("edgetune_confidence", text, ["adapter"], buckets=_CONFIDENCE, registry=registry)
        self._by_adapter += [self._ttft, self._switch, self._confidence]
        self._unsure = by_adapter("edgetune_unsure_answers", "Answers that were less sure than asked for")

    def count_request(self, route: str, status: int) -> None:
        """Count a finished request."""
        self._requests.labels(route, str(status)).inc()

    def count_first_piece(self, adapters: Adapters, arrived: float) -> None:
        """Count the time since a request arrived (`time.monotonic`)."""
        self._ttft.labels(self._label(adapters)).observe(time.monotonic() - arrived)

    def count_answer(self, adapters: Adapters, answer: Answer) -> None:
        """Count a finished answer."""
        label, timings = self._label(adapters), answer.timings
        self._prompt_tokens.labels(label).inc(timings.prompt_tokens)
        self._reused_tokens.labels(label).inc(timings.reused_tokens)
        self._answer_tokens.labels(label).inc(answer.tokens)
        self._draft_tokens.labels(label).inc(timings.drafted)
        self._accepted_tokens.labels(label).inc(timings.accepted)
        self._forced_tokens.labels(label).inc(timings.forced)
        self._switch.labels(label).observe(timings.switch_us / 1e6)
        self.count_sureness(adapters, answer)
        (self._hits if timings.reused_tokens else self._misses).labels(label).inc()

    def count_sureness(self, adapters: Adapters, answer: Answer | Classification) -> None:
        """Count how sure an answer or a label is."""
        label = self._label(adapters)
        if answer.confidence is not None:
            self._confidence.labels(label).observe(answer.confidence)
        self._unsure.labels(label).inc(answer.is_unsure)

    def text(self) -> bytes:
        """All figures now."""
        return generate_latest(self._registry)

    def forget(self, adapter: str) -> None:
        """Leave out an adapter that was removed."""
        self._adapters.discard(adapter)
        for metric in self._by_adapter:
            # It is there only if the adapter has answered.
            with suppress(KeyError):
                metric.remove(adapter)

    def _label(self, adapters: Adapters) -> str:
        if adapters is not None and not isinstance(adapters, str):
            adapters = next(iter(adapters), None) if len(adapters) < 2 else "several"
        if adapters is None or adapters == "several":
            return adapters or "base"
        if adapters not in self._adapters and len(self._adapters) >= _MAX_ADAPTERS:
            return "other"
        self._adapters.add(adapters)
        return adapters
