"""The home assistant of app.py over MQTT: sentences arrive on one topic, orders and replies go out on others.

home/say                        a sentence to answer
home/reply                      the answer, or a line that begins with "error: "
home/hall/light/turn_off        an order: the area and the service; the payload has the other values as JSON

An order without an area goes to the area "house": home/house/timer/start. The name and password for the broker are the
variables MQTT_USER and MQTT_PASSWORD.
"""

import argparse
import json
import os
import queue
import re
import sys
from typing import Any

import paho.mqtt.client as mqtt
from app import Home
from edgetune_runtime import EdgetuneError, Runtime
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

WAITING = 16
"""Sentences that may wait for an answer; more are dropped."""


class Broker:
    """A connection to an MQTT broker, which comes back by itself after it was lost."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.sentences: queue.Queue[str | None] = queue.Queue(WAITING)
        self.refusal = ""
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self.client.on_connect = self._subscribe
        self.client.on_subscribe = lambda *_: print(f"listening on {prefix}/say", flush=True)
        self.client.on_message = self._hear
        if user := os.environ.get("MQTT_USER"):
            self.client.username_pw_set(user, os.environ.get("MQTT_PASSWORD"))

    def publish_order(self, call: dict[str, Any]) -> str:
        """Publish a service call; returns it as an event for the adapter `reply`."""
        values = dict(call)
        area, service = values.pop("area", "house"), values.pop("service")
        if not is_name(area) or not is_name(service):
            return "failed: not understood"
        topic = "/".join([self.prefix, area, *service.split(".")]).replace(" ", "_")
        # With qos 0 nothing is kept for later: an order that comes an hour late is worse than none.
        if self.client.publish(topic, json.dumps(values), qos=0).rc != mqtt.MQTT_ERR_SUCCESS:
            return "failed: no connection"
        return f"done: {json.dumps(call)}"

    def publish_reply(self, text: str) -> None:
        """Publish what the assistant says."""
        self.client.publish(f"{self.prefix}/reply", text)

    def _subscribe(
        self, client: mqtt.Client, _data: None, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        if reason.is_failure:
            self.refusal = str(reason)
            self.sentences.put(None)
            return
        # Here, because a lost connection loses its subscriptions.
        client.subscribe(f"{self.prefix}/say")

    def _hear(self, _client: mqtt.Client, _data: None, message: mqtt.MQTTMessage) -> None:
        # A retained sentence was said long ago.
        if message.retain:
            return
        try:
            self.sentences.put_nowait(message.payload.decode())
        except UnicodeDecodeError:
            print("dropped a sentence that is not UTF-8", file=sys.stderr)
        except queue.Full:
            print(f"dropped a sentence: {WAITING} are waiting already", file=sys.stderr)


def is_name(value: object) -> bool:
    """Whether a value of the model may be part of a topic: no separators or wildcards."""
    return isinstance(value, str) and re.fullmatch(r"[\w. ]+", value) is not None


def address(text: str) -> tuple[str, int]:
    """Host and port of HOST or HOST:PORT."""
    host, _, port = text.partition(":")
    return host, int(port or 1883)


def serve(runtime: Runtime, broker: Broker) -> None:
    """Answer sentences until the broker refuses the connection."""
    home = Home(runtime, broker.publish_order)
    while (sentence := broker.sentences.get()) is not None:
        print(f"> {sentence}")
        try:
            broker.publish_reply(home.answer(sentence))
        except EdgetuneError as error:
            broker.publish_reply(f"error: {error}")


def main() -> None:
    """Open the bundle, connect to the broker and answer until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle's folder, such as build/smart-home")
    where = "the broker (default: localhost:1883)"
    parser.add_argument("--mqtt", type=address, default="localhost", metavar="HOST[:PORT]", help=where)
    parser.add_argument("--prefix", default="home", help="what all topics begin with (default: home)")
    options = parser.parse_args()
    with Runtime.open(options.bundle) as runtime:
        broker = Broker(options.prefix)
        broker.client.connect(*options.mqtt)
        # The network has a thread of its own, so that a long answer does not let the connection time out.
        broker.client.loop_start()
        try:
            serve(runtime, broker)
        finally:
            broker.client.disconnect()
            broker.client.loop_stop()
    sys.exit(f"error: the broker refused the connection ({broker.refusal}); check MQTT_USER and MQTT_PASSWORD")


if __name__ == "__main__":
    try:
        main()
    except EdgetuneError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: no connection to the MQTT broker ({error}); is it running, and is --mqtt right?")
    except KeyboardInterrupt:
        pass
