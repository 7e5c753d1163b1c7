"""A home assistant with three adapters on one base, which switches adapters between the steps of an answer.

`intent` classifies a sentence, `command` turns an order into a service call, `reply` puts the result into a butler's
words, and small talk goes to the plain base. The home here is a stub that accepts every call; mqtt_app.py has one over
MQTT. For your home, replace `accept` and `look_up`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgetune_runtime import Answer, EdgetuneError, Runtime

SENTENCES = (
    "turn off the lamp in the hall",
    "It's freezing in the bedroom.",
    "do I need an umbrella tomorrow",
    "Good evening, how are you?",
)
ORDERS = {"light", "climate", "cover", "media", "lock", "timer", "cleaning"}
FACTS = {
    "weather": "weather tomorrow: light rain",
    "shopping_list": "shopping list: 3 items",
    "status": "status: 2 lights on, all doors locked",
}
MANNER = {"role": "system", "content": "You are a calm butler. Answer in one short sentence."}


@dataclass(frozen=True)
class Home:
    """The steps that answer one sentence, using an open bundle.

    `carry_out` gets a call {"service": ..., "area": ...} and returns an event for `reply`: "done: …" or "failed: …".
    """

    runtime: Runtime
    carry_out: Callable[[dict[str, Any]], str]

    def answer(self, sentence: str) -> str:
        """The assistant's answer to a sentence; an order is carried out first."""
        intent, scores = self.runtime.classify(sentence, adapter="intent")
        print(f"  intent   {intent} ({scores[intent]:.0%})")
        if intent == "small_talk":
            return self.small_talk(sentence)
        return self.reply(self.obey(sentence) if intent in ORDERS else look_up(intent))

    def obey(self, sentence: str) -> str:
        """Carry out the order in a sentence and return the result as an event for `reply`."""
        answer = self.runtime.generate(sentence, adapter="command", max_tokens=60)
        show("command", answer)
        try:
            call = json.loads(answer.text)
        except ValueError:
            call = None
        return self.carry_out(call) if isinstance(call, dict) and "service" in call else "failed: not understood"

    def reply(self, event: str) -> str:
        """An event in the butler's words."""
        answer = self.runtime.generate(event, adapter="reply", max_tokens=40)
        show("reply", answer)
        return answer.text

    def small_talk(self, sentence: str) -> str:
        """The base's answer, without an adapter."""
        messages = [MANNER, {"role": "user", "content": sentence}]
        answer = self.runtime.generate(messages, max_tokens=40)
        show("(base)", answer)
        return answer.text


def accept(call: dict[str, Any]) -> str:
    """A stub for a real home, in which every call works."""
    return f"done: {json.dumps(call)}"


def look_up(intent: str) -> str:
    """A stub for asking a real home for the weather, the shopping list or its state."""
    return FACTS[intent]


def show(adapter: str, answer: Answer) -> None:
    """Print the adapter, its answer, the switch time and the time to first token, on one line."""
    timings = answer.timings
    print(f"  {adapter:8} {answer.text}  [switch {timings.switch_us:.0f} µs, first token {timings.ttft_ms:.0f} ms]")


def main() -> None:
    """Open the bundle once and answer each sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle's folder, such as build/smart-home")
    parser.add_argument("sentence", nargs="*", default=SENTENCES, help="sentences to answer, each in quotes")
    options = parser.parse_args()
    with Runtime.open(options.bundle) as runtime:
        home = Home(runtime, accept)
        for sentence in options.sentence:
            print(f"> {sentence}")
            print(f"  says     {home.answer(sentence)}\n")


if __name__ == "__main__":
    try:
        main()
    except EdgetuneError as error:
        sys.exit(f"error: {error}")
