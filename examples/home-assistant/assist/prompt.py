"""Rewrites a request of Home Assistant to an adapter's short prompt, and the answer to text and calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .calls import Call, Json, expand, offered, schema, script_devices, shorten
from .devices import NO_AREA, Device, Home, read_home
from .pick import pick
from .reply import reply_prompt

CALLS, REPLY = "calls", "reply"
"""The adapters: the one that writes calls, and the one that says the result."""
FLOORS = (
    "upstairs", "downstairs", "basement", "cellar", "attic", "loft", "ground floor", "first floor", "second floor",
    "third floor", "top floor", "upper floor", "lower floor", "main floor",
)  # fmt: skip
"""Words for floors. Home Assistant's prompt lists no floors, so an answer may name one of these that was said."""
NO_TOOLS = "I have no control over this home: choose Assist under Control Home Assistant in my settings."
"""What is said in place of calls when Home Assistant offers no tools; it would refuse them."""
_TIMER = re.compile(r"\b(?:timer|alarm|countdown|remind)", re.IGNORECASE)
_ASKED = re.compile(r"Which (.+?) do you mean")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What goes back to Home Assistant: a text to say, or calls of its tools with `name` and `arguments`."""

    text: str = ""
    calls: tuple[Json, ...] = ()


@dataclass(frozen=True)
class Request:
    """A rewritten request: the adapter to use, its prompt, and the schema of its answer (None: free text).

    `home` is what the system prompt lists, `devices` those in the prompt, `tools` the definitions by name.
    """

    adapter: str
    prompt: str
    schema: Json | None
    home: Home
    devices: tuple[Device, ...]
    tools: Mapping[str, Mapping[str, Any]]

    def reply(self, answer: str) -> Reply:
        """What an answer of the adapter means; an answer that was cut off is one that was not understood."""
        if self.adapter == REPLY:
            return Reply(answer.strip())
        try:
            parsed = json.loads(answer)
        except ValueError:
            return Reply("Sorry, I did not understand that.")
        if isinstance(parsed, list) and not self.tools:
            return Reply(NO_TOOLS)
        if isinstance(parsed, list):
            return Reply(calls=tuple(expand(call, self.home, self.tools) for call in parsed))
        return Reply(_say(parsed, self.devices))


def rewrite(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Request:
    """The request in short: messages as Home Assistant sends them, beginning with its system prompt, and its tools.

    After a sentence of the user the adapter `calls` answers, after the results of calls the adapter `reply`.
    """
    system = next((str(message["content"]) for message in messages if message["role"] == "system"), "")
    definitions = offered(tools)
    home = read_home(system)
    callable_home = Home((*home.devices, *script_devices(definitions)), home.here)
    turns = _turns(messages)
    sentence, after = turns[-1] if turns else ("", [])
    if any(message["role"] == "tool" for message in after):
        calls, results = dict(enumerate(_calls_of(after))), _results_of(after)
        called = [calls.get(number) or {"call": "?"} for number in results]
        prompt = reply_prompt(sentence, called, [*results.values()])
        return Request(REPLY, prompt, None, home, (), definitions)
    before = _before(turns[-2]) if len(turns) > 1 else None
    heard = f"{before[0]} {sentence}" if before else sentence
    devices = pick(callable_home, heard)
    floors = [floor for floor in FLOORS if floor in heard.lower()]
    names = definitions if definitions else None
    timers = names is None or "HassStartTimer" in names
    prompt = calls_prompt(sentence, devices, home.here, before, timers=timers)
    return Request(CALLS, prompt, schema(devices, names, floors, home.here), home, devices, definitions)


def calls_prompt(
    sentence: str,
    devices: Sequence[Device],
    here: str | None = None,
    before: tuple[str, str] | None = None,
    *,
    timers: bool = True,
) -> str:
    """The prompt of the adapter `calls`: devices by area, the microphone's area, the turn before, the sentence.

    `before` is the sentence of that turn and its answer in short form. Without `timers`, a sentence about a timer is
    marked so.
    """
    places: dict[str, list[str]] = {}
    for device in devices:
        place = " = ".join(device.areas) or NO_AREA
        places.setdefault(place, []).append(f"{device.domain} {' = '.join(device.names)}")
    lines = [f"{place}: {'; '.join(listed)}" for place, listed in places.items()]
    if here:
        lines.append(f"here: {here}")
    if not timers and _TIMER.search(sentence):
        lines.append("no timers")
    if before:
        lines.append(f"before: {before[0]} = {before[1]}")
    return "\n".join([*lines, f"> {sentence.strip()}"])


def question(domain: str, devices: Sequence[Device]) -> str:
    """What to ask if several devices of a domain may be meant."""
    names = [f"{device.name} in {device.area}" if device.area else device.name for device in _asked(domain, devices)]
    noun = _noun(domain)
    return f"Which {noun} do you mean: {', '.join(names)}?" if names else f"Which {noun} do you mean?"


def _say(answer: Mapping[str, Any], devices: Sequence[Device]) -> str:
    """The words for an answer that is not a call."""
    if "ask" in answer:
        return question(str(answer["ask"]), devices)
    if answer.get("missing") == "timer":
        return "I can't set timers on this device."
    if "missing" in answer:
        return f"I found no such {_noun(str(answer['missing']))}."
    return "I can only help with the devices of this home."


def _asked(domain: str, devices: Sequence[Device]) -> list[Device]:
    """The devices to choose from: all of the domain if a name is not enough, at most five."""
    return [device for device in devices if device.domain == domain][:5]


def _noun(domain: str) -> str:
    return {"todo": "list", "climate": "thermostat"}.get(domain, domain.replace("_", " "))


def _turns(messages: Sequence[Message]) -> list[tuple[str, list[Message]]]:
    """The sentences of the user, each with the messages after it."""
    turns: list[tuple[str, list[Message]]] = []
    for message in messages:
        if message["role"] == "user":
            turns.append((str(message["content"]), []))
        elif turns and message["role"] != "system":
            turns[-1][1].append(message)
    return turns


def _before(turn: tuple[str, list[Message]]) -> tuple[str, str] | None:
    """A turn as the sentence and the short form of its answer; None if the answer had neither calls nor a question."""
    sentence, after = turn
    if calls := [call for call in _calls_of(after) if call]:
        return sentence, json.dumps(calls, ensure_ascii=False)
    texts = [str(message.get("content") or "") for message in after if message["role"] == "assistant"]
    match = _ASKED.match(texts[-1]) if texts else None
    if match is None:
        return None
    domain = {"list": "todo", "thermostat": "climate"}.get(match[1], match[1].replace(" ", "_"))
    return sentence, json.dumps({"ask": domain})


def _calls_of(messages: Sequence[Message]) -> list[Call | None]:
    """The calls of a turn in short form, one item per call: None for a tool that the adapter does not know."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls") or []]
    return [shorten(call["name"], _object(call.get("arguments"))) for call in calls]


def _results_of(messages: Sequence[Message]) -> dict[int, Mapping[str, Any]]:
    """The results of a turn by the numbers of their calls, in the order of these.

    These are found by their ids, which Ollama's API does not have: there the results are in the order of the calls.
    """
    ids = [call.get("id") for message in messages for call in message.get("tool_calls") or []]
    results = dict[int, Mapping[str, Any]]()
    for place, message in enumerate(message for message in messages if message["role"] == "tool"):
        own = message.get("tool_call_id")
        results[ids.index(own) if own and own in ids else place] = _result(_object(message.get("content")))
    return dict(sorted(results.items()))


def _result(returned: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a tool returned; newer versions of Home Assistant put it into `data`, beside whether it is an error."""
    if returned.keys() != {"data", "error"}:
        return returned
    failed = {"error": "failed"} if returned["error"] else {}
    return failed | _object(returned["data"])


def _object(value: object) -> dict[str, Any]:
    """Arguments or a result, which clients send as an object or as its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"result": value}
    return value if isinstance(value, dict) else {"result": value}
