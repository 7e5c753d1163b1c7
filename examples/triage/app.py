"""Answers the mail of a bicycle workshop: an encoder finds the topic of a message, a decoder writes the reply.

Both bundles are open in one process. Spam gets no reply, and a message without a clear topic is left to a person. The
facts in the replies come from `look_up`, which is a stub here: the model words them, it does not invent them.
"""

import argparse
import sys
from dataclasses import dataclass

from edgetune_runtime import EdgetuneError, Runtime

MESSAGES = (
    "is my red bike done yet?",
    "What would a new chain cost?",
    "Cheap loans for your company, no questions asked",
    "The wheel you repaired is flat again!",
)
SURE = 0.6
"""The probability from which on a topic counts as clear."""
FACTS = {
    "booking": "free: Thursday 10:00",
    "status": "in work, ready on Friday",
    "hours": "Tuesday to Friday 9 to 18, Saturday 9 to 13",
    "complaint": "Mira calls today",
}
PRICES = {
    "chain": "a new chain, 35 euros",
    "puncture": "a puncture repair, 18 euros",
    "brake": "new brake pads, 28 euros",
}


@dataclass(frozen=True)
class Mailbox:
    """Both open bundles."""

    sorter: Runtime
    writer: Runtime

    def answer(self, message: str) -> str | None:
        """The reply to a message; None if it gets none."""
        topic, scores = self.sorter.classify(message, adapter="topic")
        print(f"  topic    {topic} ({scores[topic]:.0%})")
        if topic == "spam" or scores[topic] < SURE:
            return None
        prompt = f"{topic}: {look_up(topic, message)}\n{message}"
        return self.writer.generate(prompt, adapter="reply", max_tokens=60).text


def look_up(topic: str, message: str) -> str:
    """A stub for the workshop's calendar, orders and price list."""
    if topic == "price":
        return next((price for word, price in PRICES.items() if word in message.lower()), "not in the list")
    return FACTS[topic]


def main() -> None:
    """Open both bundles once and answer each message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sorter", help="the bundle made from sort.yaml, such as build/triage-sort")
    parser.add_argument("writer", help="the bundle made from reply.yaml, such as build/triage-reply")
    parser.add_argument("message", nargs="*", default=MESSAGES, help="messages to answer, each in quotes")
    options = parser.parse_args()
    with Runtime.open(options.sorter) as sorter, Runtime.open(options.writer) as writer:
        mailbox = Mailbox(sorter, writer)
        for message in options.message:
            print(f"> {message}")
            print(f"  reply    {mailbox.answer(message) or '(none)'}\n")


if __name__ == "__main__":
    try:
        main()
    except EdgetuneError as error:
        sys.exit(f"error: {error}")
