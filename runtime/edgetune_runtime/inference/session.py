"""A conversation that can change adapters; it has its own KV state and can be saved to a file."""

from __future__ import annotations

import logging
import math
import uuid
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Literal, Self, Unpack

from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.formats.checked_file import read_checked, write_checked
from edgetune_runtime.serving.adapters import MergedPool
from edgetune_runtime.serving.pool import Pool
from edgetune_runtime.states.activation import Spans
from edgetune_runtime.states.cache import Key, SavedState
from edgetune_runtime.states.store import KIND
from edgetune_runtime.text.chat import Message, Prompt, messages_for

from .adapter_choice import Adapters, names_of
from .answer import STILL_OPEN, Answer, Outcome, Stream
from .call import Call, CarriedState
from .loaded import LoadedBundle
from .options import AnswerOptions, split_options
from .unsure import AnswerCall, answer_pieces

Carry = Literal["recompute", "reuse"]
"""What becomes of the state when a session changes adapters; see `Session.use`."""

_LOG = logging.getLogger(__name__)


class Session(AbstractContextManager["Session"]):
    """A conversation: a history of messages, the current adapters, and a KV state that no other session reuses.

    with runtime.session(adapter="chat") as session:
        session.send("good morning")
        session.use("sql")
        session.send("how many orders came in today?")

    An answer is the one that a newly opened runtime gives to the whole history with the current adapters; only the
    tokens without a cached state are computed. With `auto`, the router chooses the adapter of each message. An answer
    cut short by a deadline or cancellation is not added to the history. Not thread-safe.
    """

    def __init__(self, loaded: LoadedBundle, adapter: Adapters, history: Sequence[Message] = ()) -> None:
        self.adapter = adapter
        self.history: list[Message] = [dict(message) for message in history]
        self._loaded = loaded
        self._answering = self._until_routed(adapter)
        # Adapters that cannot answer are refused now; `AsyncRuntime.session` must not wait for one that is replaced.
        if not loaded.replaced.any_of(names_of(self._answering)):
            self._pool_of(self._answering)
        self._owner = uuid.uuid4().hex
        self._last: CarriedState | None = None
        self._carries = False
        self._stream: weakref.ref[Stream] | None = None

    def send(self, message: Prompt, **options: Unpack[AnswerOptions]) -> Answer:
        """Answer a message of the user, or chat messages such as the results of tools.

        Same options and errors as `Runtime.generate`.
        """
        return self.stream(message, **options).read()

    def stream(self, message: Prompt, **options: Unpack[AnswerOptions]) -> Stream:
        """Like `send`, but yields the text piece by piece. Only an answer read to its end is added to the history.

        UsageError while another stream of the session is open.
        """
        if self._opened() is not None:
            raise UsageError(*STILL_OPEN)
        stream = self._begin(message, **options)
        self._stream = weakref.ref(stream)
        return stream

    def _begin(self, message: Prompt, **options: Unpack[AnswerOptions]) -> Stream:
        """Open a stream, of which the caller knows that it is the only one."""
        messages = [*self.history, *messages_for(message, None)]
        adapter, carried = self.adapter, self._last if self._carries else None
        limits, form, others = split_options(options)
        outcome = Outcome()

        def prepare() -> Generator[str, None, None]:
            call = self._loaded.call(
                messages, adapter, owner=self._owner, carried=carried, form=form, check=limits.check
            )
            if call.route is not None:
                self._answering = call.route.adapter
            answer_call = AnswerCall(call, messages, form, limits, others)
            return self._recorded(messages, call, answer_pieces(self._loaded, answer_call, outcome, options), outcome)

        return Stream(self._loaded.replaced.pieces(prepare), outcome)

    def use(self, adapter: Adapters, *, carry: Carry = "recompute") -> None:
        """Use other adapters from now on; an error, as of `Runtime.generate` with them, changes nothing.

        With `carry="recompute"` the history is recomputed with the new adapters, except for what is cached. This is
        exact. With "reuse" the new adapters continue from the state that the previous adapters computed, with their
        system prompt. This is immediate, but the answers are not those that the new adapters alone would give.
        `Answer.timings.carried_tokens` counts the tokens carried over; there are none after one of the previous
        adapters was removed. Not for `auto`, and not to another prefix: a prefix comes before all tokens.
        IncompatibleError where it is not possible.
        """
        if carry not in ("recompute", "reuse"):
            raise UsageError(f"carry is {carry!r}", "give recompute or reuse")
        answering = self._until_routed(adapter)
        pool, active = self._pool_of(answering)
        if carry == "reuse" and answering != adapter:
            message = f"a state cannot be carried over to {adapter!r}, which is another adapter for each message"
            raise IncompatibleError(message, 'use carry="recompute"')
        # What an adapter computed that was removed is not carried over.
        is_there = self._loaded.manifest.adapters.keys() >= {*names_of(self._answering)}
        if carry == "reuse" and is_there and pool != self._pool():
            message = "the state of one model cannot be reused by another, and a merged adapter is a full model"
            raise IncompatibleError(message, 'use carry="recompute"')
        carried = self._loaded.still_there(self._last) if carry == "reuse" else None
        if carried is not None:
            self._loaded.require_one_prefix([active, *(names for _, names in carried.spans)])
        self.adapter, self._answering = adapter, answering
        self._carries = carry == "reuse"

    def save(self, path: str | Path) -> None:
        """Write the conversation and its state to a file, atomically.

        OutOfSpaceError on a full disk, OSError when the file cannot be written.
        """
        last = self._last
        with self._pool().opened() as pool:
            saved = pool.saved(self._owner)
            identity = saved and pool.identity_of(saved)
        conversation = {
            "base": self._loaded.manifest.base.fingerprint,
            "adapter": self.adapter if self.adapter is None or isinstance(self.adapter, str) else dict(self.adapter),
            "history": self.history,
            "carries": self._carries,
            "last": last and {"tokens": last.tokens, "spans": last.spans, "system": last.system},
        }
        key = saved and {"base": saved.key.base, "spans": saved.key.spans, "tokens": saved.tokens}
        state = saved and {"key": key, "identity": identity}
        about = {"conversation": conversation, "state": state}
        write_checked(Path(path), KIND, about, saved.state if saved is not None else memoryview(b""))

    @classmethod
    def _load(cls, loaded: LoadedBundle, path: Path) -> Self:
        """Load what `save` wrote; see `Runtime.load_session`."""
        loaded.lifetime.check()
        stored = read_checked(path, KIND)
        if stored is None and not path.exists():
            raise NotFoundError(f"no file {path}", "check the path")
        try:
            if stored is None:
                raise ValueError("its checksum or length is wrong")
            conversation, state = stored.about["conversation"], stored.about["state"]
            base, adapter, history = (conversation[key] for key in ("base", "adapter", "history"))
            if base != loaded.manifest.base.fingerprint:
                message = f"{path} is a session on another base than the one in bundle {loaded.manifest.name!r}"
                raise IncompatibleError(message, "open the bundle that it was saved with")
            if not isinstance(adapter, str | dict | None):
                raise TypeError(f"its adapter is {adapter!r}")
            session = cls(loaded, adapter, messages_for(history, None) if history else ())
            session._carries, session._last = bool(conversation["carries"]), _carried_of(conversation["last"])
            if state is not None:
                saved = _saved_of(state["key"], stored.data)
                with session._pool().opened() as pool:
                    if pool.identity_of(saved) == state["identity"]:
                        pool.keep(saved, session._owner)
                    else:
                        _LOG.warning("dropped the state in %s: it was made with other files or another engine", path)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as error:
            raise VerificationError(f"{path} is not a saved session: {error}", "save the session again") from error
        return session

    def close(self) -> None:
        """Close an open stream and drop the session's state; a second call does nothing."""
        stream = self._opened()
        if stream is not None and not self._loaded.lifetime.is_of_parent:
            # One that another thread reads is waited for.
            with suppress(UsageError):
                stream.close()
        self._loaded.drop_states(self._owner)
        self._last = None

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _opened(self) -> Stream | None:
        """The stream of the session that is open."""
        stream = None if self._stream is None else self._stream()
        return stream if stream is not None and stream._is_open else None

    def _recorded(
        self, messages: list[Message], call: Call, pieces: Iterator[str], outcome: Outcome
    ) -> Generator[str, None, None]:
        yield from pieces
        answer = outcome.answer
        if answer is not None and not answer.was_stopped:
            self.history = [*messages, answer.message]
            self._last = CarriedState(outcome.tokens, call.job.spans, call.system)

    def _pool(self) -> Pool | MergedPool:
        return self._loaded.pool(self._answering)[0]

    def _pool_of(self, adapter: Adapters) -> tuple[Pool | MergedPool, dict[str, float]]:
        """The pool of adapters that can be used together, and their scales."""
        pool, active = self._loaded.pool(adapter)
        self._loaded.capacity(active)
        return pool, active

    def _until_routed(self, adapter: Adapters) -> Adapters:
        """The adapters that answer; for `auto` the base, until the router has chosen."""
        return None if self._loaded.is_routed(adapter) else adapter


def _carried_of(values: Mapping[str, Any] | None) -> CarriedState | None:
    if values is None:
        return None
    tokens, system = [int(token) for token in values["tokens"]], values["system"]
    if not isinstance(system, str | None):
        raise TypeError(f"its system prompt is {system!r}")
    return CarriedState(tokens, _spans_of(values["spans"]), system)


def _saved_of(values: Mapping[str, Any], state: memoryview) -> SavedState:
    spans = tuple((start, tuple(active.items())) for start, active in _spans_of(values["spans"]))
    return SavedState(Key(values["base"], spans), tuple(int(token) for token in values["tokens"]), state)


def _spans_of(values: Iterable[Any]) -> Spans:
    """The spans of a sequence from its first token on; ValueError for others."""
    spans = tuple((int(start), {str(n): float(s) for n, s in dict(active).items()}) for start, active in values)
    starts, scales = [start for start, _ in spans], [scale for _, active in spans for scale in active.values()]
    if starts[:1] != [0] or starts != sorted({*starts}) or not all(map(math.isfinite, scales)):
        raise ValueError(f"its spans begin at {starts} with the scales {scales}")
    return spans
