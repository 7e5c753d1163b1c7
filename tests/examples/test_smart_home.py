"""The smart home: app.py as it is, and mqtt_app.py with Debian's mosquitto on loopback."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import paho.mqtt.client as mqtt
import pytest
from examples.conftest import EXAMPLES, ORDERS
from ports import free_port, wait_for_port

# Debian installs it where only root's PATH has it.
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto: apt install mosquitto")
SMART_HOME = EXAMPLES / "smart-home"
LAMP, BLIND, TIMER = ORDERS
WAIT_S = 30
"""How long a test waits for something before it fails."""


@contextmanager
def broker_at(port: int, folder: Path, anonymous: str = "true") -> Iterator[None]:
    """mosquitto on this port of loopback, until the block ends."""
    assert MOSQUITTO is not None
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous {anonymous}\n", encoding="utf-8")
    with subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_port(port)
            yield
        finally:
            process.terminate()


class App:
    """mqtt_app.py in a process of its own."""

    def __init__(self, bundle: Path, port: int) -> None:
        command = [sys.executable, str(SMART_HOME / "mqtt_app.py"), str(bundle), "--mqtt", f"127.0.0.1:{port}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(self, line: str) -> None:
        """Wait until the app prints this line."""
        assert self.process.stdout is not None
        while (printed := self.process.stdout.readline()) and printed.strip() != line:
            pass
        assert printed, f"{line!r} was not printed; {self.process.stderr and self.process.stderr.read()}"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.communicate(timeout=WAIT_S)[1] == ""


class Listener:
    """A client that says sentences to the app and keeps what the app publishes."""

    def __init__(self, port: int) -> None:
        self.heard: queue.Queue[tuple[str, str]] = queue.Queue()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self.client.on_message = lambda _c, _d, message: self.heard.put((message.topic, message.payload.decode()))
        subscribed: queue.Queue[int] = queue.Queue()
        self.client.on_subscribe = lambda _c, _d, mid, _r, _p: subscribed.put(mid)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.client.subscribe([("home/reply", 1), ("home/+/+/+", 1)])
        subscribed.get(timeout=WAIT_S)

    def say(self, sentence: str | bytes, **options: bool) -> None:
        self.client.publish("home/say", sentence, qos=1, **options).wait_for_publish(WAIT_S)

    def next(self) -> tuple[str, str]:
        """Topic and payload of the next message of the app."""
        return self.heard.get(timeout=WAIT_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@contextmanager
def listening(port: int) -> Iterator[Listener]:
    listener = Listener(port)
    try:
        yield listener
    finally:
        listener.close()


@pytest.fixture
def app_of(home_bundle: Path) -> Iterator[Callable[[int], App]]:
    """`app_of(port)` starts the app; it is stopped as with Ctrl-C, and must have reported no error."""
    apps: list[App] = []

    def start(port: int) -> App:
        apps.append(App(home_bundle, port))
        apps[-1].wait_for("listening on home/say")
        return apps[-1]

    yield start
    for app in apps:
        app.stop()


@needs_mosquitto
def test_orders_go_to_their_topics_questions_are_answered_and_a_bad_sentence_stops_nothing(
    app_of: Callable[[int], App], tmp_path: Path
) -> None:
    port = free_port()
    with broker_at(port, tmp_path), listening(port) as listener:
        listener.say("said before the app was there", retain=True)
        app_of(port)
        listener.say("lamp " * 2000)
        listener.say("what is the weather")
        topic, error = listener.next()
        assert topic == "home/reply"
        assert error.startswith("error: ")
        assert listener.next() == ("home/reply", "If I may, light rain.")
        for sentence, topic, payload in (
            (LAMP, "home/hall/light/turn_off", {}),
            (BLIND, "home/living_room/cover/open", {}),
            (TIMER, "home/house/timer/start", {"minutes": 5}),
        ):
            listener.say(sentence)
            heard, order = listener.next()
            assert (heard, json.loads(order)) == (topic, payload)
            assert listener.next() == ("home/reply", f"Certainly, {ORDERS[sentence]['service']}.")


@needs_mosquitto
def test_the_app_listens_again_when_the_broker_is_back(app_of: Callable[[int], App], tmp_path: Path) -> None:
    port = free_port()
    with broker_at(port, tmp_path):
        app = app_of(port)
    with broker_at(port, tmp_path), listening(port) as listener:
        app.wait_for("listening on home/say")
        listener.say("what is the weather")
        assert listener.next() == ("home/reply", "If I may, light rain.")


@needs_mosquitto
def test_a_broker_that_refuses_the_app_is_one_line(home_bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    with broker_at(port, tmp_path, anonymous="false"):
        process = App(home_bundle, port).process
        _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    refusal = "error: the broker refused the connection (Not authorized); check MQTT_USER and MQTT_PASSWORD\n"
    assert error == refusal


def test_no_broker_is_one_line(home_bundle: Path) -> None:
    process = App(home_bundle, free_port()).process
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert error.startswith("error: no connection to the MQTT broker")
    assert error.count("\n") == 1


@pytest.fixture
def mqtt_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """mqtt_app.py as a module."""
    monkeypatch.syspath_prepend(str(SMART_HOME))
    yield import_module("mqtt_app")
    for name in ("mqtt_app", "app"):
        del sys.modules[name]


@pytest.mark.parametrize(
    "call",
    [
        {"service": "light/turn_off"},
        {"service": "light.turn_off", "area": "#"},
        {"service": 3},
        {"service": "x", "area": None},
    ],
)
def test_invented_areas_and_services_reach_no_other_topic(mqtt_app: ModuleType, call: dict[str, object]) -> None:
    assert mqtt_app.Broker("home").publish_order(call) == "failed: not understood"


def test_an_order_without_a_connection_fails_and_is_not_kept(mqtt_app: ModuleType) -> None:
    broker = mqtt_app.Broker("home")
    assert broker.publish_order({"service": "light.turn_off", "area": "hall"}) == "failed: no connection"
    assert not broker.client.want_write()


def test_app_answers_sentences_of_the_command_line(home_bundle: Path) -> None:
    command = [sys.executable, str(SMART_HOME / "app.py"), str(home_bundle), LAMP, "what is the weather"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "intent   light" in done.stdout
    assert '{"service": "light.turn_off", "area": "hall"}' in done.stdout
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if "says" in line] == [
        "Certainly, light.turn_off.",
        "If I may, light rain.",
    ]
