"""Messages in, answers out: a conversation whose adapter may change, with a state that is its own."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from .errors import IncompatibleError, NotFoundError, UsageError, VerificationError
from .formats.checked_file import read_checked, write_checked
from .generation import Answer, Call, Carried, Generation, Stream, generate
from .loaded import Adapters, LoadedBundle
from .options import AnswerOptions, split_form
from .serving.pool import Pool
from .states.cache import Key, SavedState
from .states.store import KIND
from .text.chat import Message

Carry = Literal["recompute", "reuse"]

_LOG = logging.getLogger(__name__)
_STOPPED = ("deadline", "cancelled")


class Session:
    """A conversation: a history of messages, the adapters that answer next, and a state that no other session sees.

    with runtime.session(adapter="chat") as session:
        session.send("good morning")
        session.use("sql")
        session.send("how many orders came in today?")

    An answer is that of a fresh runtime to the whole history under the adapters in use, computed as far as it is not
    known. One that a deadline or a cancel cut short is not taken into the history. Not for two threads at once.
    """

    def __init__(self, loaded: LoadedBundle, adapter: Adapters, history: Sequence[Message] = ()) -> None:
        self.adapter = adapter
        self.history: list[Message] = [dict(message) for message in history]
        self._loaded = loaded
        self._owner = uuid.uuid4().hex
        self._last: Carried | None = None
        self._carries = False

    def send(self, message: str, **options: Unpack[AnswerOptions]) -> Answer:
        """Answer a message; options as those of `Runtime.generate`, and the same errors."""
        return self.stream(message, **options).read()

    def stream(self, message: str, **options: Unpack[AnswerOptions]) -> Stream:
        """As `send`, but yields the text in pieces. Only an answer that was read to its end is in the history."""
        messages = [*self.history, {"role": "user", "content": message}]
        carried = self._last if self._carries else None
        form, is_free, others = split_form(options)
        call = self._loaded.call(messages, self.adapter, owner=self._owner, carried=carried, form=form, free=is_free)
        outcome = Generation()
        return Stream(self._recorded(messages, call, generate(call, outcome, **others), outcome), outcome)

    def use(self, adapter: Adapters, *, carry: Carry = "recompute") -> None:
        """Let other adapters answer from now on; NotFoundError for an unknown one, the old ones then stay.

        With `carry="recompute"` the history is computed again under them, unless its state under them is known: exact.
        With "reuse" the state stays as the adapters so far have made it, their system prompt included: at once, but no
        answer that these adapters alone would give. `Answer.timings.carried_tokens` says how much stands.
        """
        if carry not in ("recompute", "reuse"):
            raise UsageError(f"carry is {carry!r}", "give recompute or reuse")
        pool, _ = self._loaded.pool(adapter)
        if carry == "reuse" and pool is not self._pool():
            raise IncompatibleError("a merged model cannot take up another one's state", 'use carry="recompute"')
        self.adapter = adapter
        self._carries = carry == "reuse"

    def save(self, path: str | Path) -> None:
        """Write the conversation and its state into a file, whole or not at all.

        OutOfSpaceError on a full disk, OSError when the file cannot be written.
        """
        pool, last = self._pool(), self._last
        saved = pool.saved(self._owner)
        conversation = {
            "base": self._loaded.manifest.base.fingerprint,
            "adapter": self.adapter if self.adapter is None or isinstance(self.adapter, str) else dict(self.adapter),
            "history": self.history,
            "carries": self._carries,
            "last": last and {"tokens": last.tokens, "spans": last.spans, "system": last.system},
        }
        key = saved and {"base": saved.key.base, "spans": saved.key.spans, "tokens": saved.tokens}
        state = saved and {"key": key, "identity": pool.identity_of(saved)}
        about = {"conversation": conversation, "state": state}
        write_checked(Path(path), KIND, about, saved.state if saved is not None else memoryview(b""))

    @classmethod
    def _load(cls, loaded: LoadedBundle, path: Path) -> Self:
        """What `save` wrote; see `Runtime.load_session`."""
        found = read_checked(path, KIND)
        if found is None and not path.exists():
            raise NotFoundError(f"no file {path}", "check the path")
        try:
            if found is None:
                raise ValueError("its bytes are not those that were written")
            conversation, state = found.about["conversation"], found.about["state"]
            base, adapter, history = (conversation[key] for key in ("base", "adapter", "history"))
            if base != loaded.manifest.base.fingerprint:
                message = f"{path} is a session on another base than that of bundle {loaded.manifest.name!r}"
                raise IncompatibleError(message, "open the bundle that it was saved with")
            session = cls(loaded, adapter, history)
            pool = session._pool()
            session._carries, session._last = bool(conversation["carries"]), _carried_of(conversation["last"])
            if state is not None:
                saved = _saved_of(state["key"], found.data)
                if pool.identity_of(saved) == state["identity"]:
                    pool.keep(saved, session._owner)
                else:
                    _LOG.warning("dropped the state in %s, which is of other files or another engine", path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VerificationError(f"{path} is no saved session: {error}", "save the session again") from error
        return session

    def close(self) -> None:
        """Forget the session's state; a second call does nothing."""
        self._loaded.forget(self._owner)
        self._last = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recorded(
        self, messages: list[Message], call: Call, pieces: Iterator[str], outcome: Generation
    ) -> Generator[str, None, None]:
        yield from pieces
        answer = outcome.answer
        if answer is not None and answer.stop_reason not in _STOPPED:
            self.history = [*messages, {"role": "assistant", "content": answer.text}]
            self._last = Carried(outcome.tokens, call.job.spans, call.system)

    def _pool(self) -> Pool:
        return self._loaded.pool(self.adapter)[0]


def _carried_of(values: Mapping[str, Any] | None) -> Carried | None:
    if values is None:
        return None
    spans = tuple((int(since), dict(adapters)) for since, adapters in values["spans"])
    return Carried([int(token) for token in values["tokens"]], spans, values["system"])


def _saved_of(values: Mapping[str, Any], state: memoryview) -> SavedState:
    spans = tuple((int(since), tuple((str(n), float(s)) for n, s in active)) for since, active in values["spans"])
    return SavedState(Key(values["base"], spans), tuple(int(token) for token in values["tokens"]), state)
