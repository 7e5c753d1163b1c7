"""Sentences in, what a home assistant does and says out: three adapters on one base, a switch between each step.

`intent` says what a sentence is about, `command` turns an order into a service call, `reply` puts the outcome into the
butler's words, and small talk goes to the plain base. The home here is a stub that says yes to every call. A real one
replaces `call_home` and `look_up`; nothing else changes.
"""

import argparse
import json
import sys
from dataclasses import dataclass

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
    """The steps that answer one sentence, on an open bundle."""

    runtime: Runtime

    def answer(self, sentence: str) -> str:
        """What the assistant says to a sentence; an order is carried out first."""
        intent, scores = self.runtime.classify(sentence, adapter="intent")
        print(f"  intent   {intent} ({scores[intent]:.0%})")
        if intent == "small_talk":
            return self.small_talk(sentence)
        return self.reply(self.carry_out(sentence) if intent in ORDERS else look_up(intent))

    def carry_out(self, sentence: str) -> str:
        """Have the home do what the sentence asks for; the outcome as an event for `reply`."""
        answer = self.runtime.generate(sentence, adapter="command", max_tokens=60)
        show("command", answer)
        try:
            call = json.loads(answer.text)
        except ValueError:
            return "failed: not understood"
        return call_home(call)

    def reply(self, event: str) -> str:
        """An event in the butler's words."""
        answer = self.runtime.generate(event, adapter="reply", max_tokens=40)
        show("reply", answer)
        return answer.text

    def small_talk(self, sentence: str) -> str:
        """What the base says without any adapter."""
        messages = [MANNER, {"role": "user", "content": sentence}]
        answer = self.runtime.generate(messages, max_tokens=40)
        show("(base)", answer)
        return answer.text


def call_home(call: object) -> str:
    """Where a real home would be called with {"service": ..., "area": ...}; says whether that worked."""
    if isinstance(call, dict) and "service" in call:
        return f"done: {json.dumps(call)}"
    return "failed: not understood"


def look_up(intent: str) -> str:
    """Where a real home would be asked for the weather, the shopping list or its own state."""
    return FACTS[intent]


def show(adapter: str, answer: Answer) -> None:
    """One line: the adapter, what it wrote, and how long the switch and the first token took."""
    timings = answer.timings
    print(f"  {adapter:8} {answer.text}  [switch {timings.switch_us:.0f} µs, first token {timings.ttft_ms:.0f} ms]")


def main() -> None:
    """Open the bundle once and answer each sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle's folder, such as build/smart-home")
    parser.add_argument("sentence", nargs="*", default=SENTENCES, help="sentences to answer, each in quotes")
    options = parser.parse_args()
    with Runtime.open(options.bundle) as runtime:
        home = Home(runtime)
        for sentence in options.sentence:
            print(f"> {sentence}")
            print(f"  says     {home.answer(sentence)}\n")


if __name__ == "__main__":
    try:
        main()
    except EdgetuneError as error:
        sys.exit(f"error: {error}")
