"""Makes the rows of the adapter `reply`: what was said, what the calls returned, and the sentence to say."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from assist.calls import Call, expand
from assist.devices import Device, Home, listing
from assist.reply import reply_prompt

from . import orders, others
from .homes import invent
from .orders import Said
from .speech import say

Row = dict[str, str]
Result = Mapping[str, Any]

PER_HOME = 8
ERRORS = ("MatchFailedError", "device is unavailable", "timeout", "service call failed", "not supported by this device")
DONE = {
    "TurnOn": {
        "lock": "{names} is locked.",
        "cover": "{names} is opening.",
        "valve": "{names} is open.",
        "": "{names} is on.",
    },
    "TurnOff": {
        "lock": "{names} is unlocked.",
        "cover": "{names} is closing.",
        "valve": "{names} is closed.",
        "": "{names} is off.",
    },
    "LightSet": {"": "{names} is set to {value}."},
    "SetPosition": {"": "{names} moves to {value}."},
    "StopMoving": {"": "{names} has stopped."},
    "ClimateSetTemperature": {"": "{names} is set to {value}."},
    "FanSetSpeed": {"": "{names} runs at {value}."},
    "MediaPause": {"": "Paused {names}."},
    "MediaUnpause": {"": "{names} plays again."},
    "MediaNext": {"": "Next one on {names}."},
    "MediaPrevious": {"": "Previous one on {names}."},
    "SetVolume": {"": "The volume of {names} is {value}."},
    "SetVolumeRelative": {"": "Volume {value} on {names}."},
    "MediaSearchAndPlay": {"": "Playing {value} on {names}."},
    "VacuumStart": {"": "{names} starts cleaning."},
    "VacuumReturnToBase": {"": "{names} goes back to its base."},
    "ListAddItem": {"": "Added {value} to {names}."},
    "ListCompleteItem": {"": "{value} on {names} is done."},
    "ListRemoveItem": {"": "Removed {value} from {names}."},
}
"""What to say of a call that worked, by tool and domain."""
_UNITS = {"brightness": " percent", "position": " percent", "percentage": " percent", "volume_level": " percent"}


def rows(seed: str, home: Home | None, share: float, *, training: bool) -> Iterator[Row]:
    """Endless rows, the same for the same seed: this `share` of them about `home`, the others about invented homes."""
    rng = random.Random(seed)
    invented, number = invent(rng), 0
    while True:
        at = home if home is not None and rng.random() < share else invented
        maker = rng.choice((_done, _done, _states, _states, _clock))
        row = maker(at, rng, training=training)
        if row is None:
            continue
        yield row
        number += 1
        if number % PER_HOME == 0:
            invented = invent(rng)


def _row(made: Said, call: Call, result: Result, text: str, rng: random.Random) -> Row:
    return {"prompt": reply_prompt(say(made.sentence, rng), [call], [result]), "completion": text[0].upper() + text[1:]}


def _done(home: Home, rng: random.Random, *, training: bool) -> Row | None:
    """An order that was done, or that failed."""
    made = rng.choice((orders.untargeted, others.on_list, _order))(home, rng, training=training)
    if made is None or not isinstance(made.answer, list) or len(made.answer) > 1 or made.answer[0]["call"] not in DONE:
        return None
    call = made.answer[0]
    if rng.random() < 0.1:
        error = rng.choice(ERRORS)
        return _row(
            made, call, {"error": "HomeAssistantError", "error_text": error}, f"That did not work: {error}.", rng
        )
    targets = _matched(home, call)
    if not targets:
        return None
    success = [{"name": device.name, "type": "entity", "id": f"{device.domain}.x"} for device in targets]
    result = {"response_type": "action_done", "data": {"success": success, "failed": []}}
    return _row(made, call, result, _done_text(call, targets), rng)


def _order(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    built = orders.order(home, rng, training=training, callable_only=True)
    return built.said if built else None


def _matched(home: Home, call: Call) -> list[Device]:
    """The devices that a call is for."""
    arguments = expand(call, home, {})["arguments"]
    domain = (arguments.get("domain") or [{"List": "todo", "Clim": "climate"}.get(call["call"][:4], "media_player")])[0]
    fit = [device for device in home.devices if device.domain == domain]
    return [
        device
        for device in fit
        if call.get("name") in (None, device.name) and call.get("area") in (None, device.area) and "floor" not in call
    ][:6]


def _done_text(call: Call, targets: list[Device]) -> str:
    forms = DONE[call["call"]]
    text = forms.get(targets[0].domain) or forms[""]
    key, value = next(((key, value) for key, value in reversed(call.items()) if key not in {"name", "area"}), ("", ""))
    names = [
        device.name if "'s" in device.name or call["call"].startswith("List") else f"the {device.name}"
        for device in targets
    ]
    listed = " and ".join(", ".join(names).rsplit(", ", 1)) if len(names) > 1 else names[0]
    if len(names) > 1:
        text = (
            text.replace(" is ", " are ").replace(" has ", " have ").replace("moves", "move").replace("starts", "start")
        )
        text = text.replace("runs", "run").replace("plays", "play").replace("goes back to its", "go back to their")
    return text.format(names=listed, value=f"{value}{_UNITS.get(key, '')}")


def _states(home: Home, rng: random.Random, *, training: bool) -> Row | None:
    """A question about a device or about all of a domain, and the states that answer it."""
    made = others.question(home, rng, training=training)
    if made is None or not isinstance(made.answer, list) or made.answer[0]["call"] != "GetLiveContext":
        return None
    call = made.answer[0]
    devices = [
        device
        for device in home.devices
        if call.get("name") in (None, device.name)
        and call.get("area") in (None, device.area)
        and call.get("domain") in (None, device.domain)
        and device.domain not in {"scene", "script", "todo"}
    ]
    if "name" in call:
        devices = devices[:1]
    elif "domain" not in call:
        devices = [device for device in devices if device.domain in {"climate", "sensor", "weather"}]
    if not devices or len(devices) > 4:
        return None
    with_states = [_with_state(device, rng) for device in devices]
    result = {
        "success": True,
        "result": "Live Context: An overview of the areas and the devices in this smart home:\n" + listing(with_states),
    }
    text = " ".join(_state_text(device) for device in with_states)
    return _row(made, call, result, text, rng)


def _with_state(device: Device, rng: random.Random) -> Device:
    """The device with a state and attributes as its domain has them."""
    attributes: dict[str, Any] = {}
    name = device.name.lower()
    match device.domain:
        case "light":
            state = rng.choice(("on", "off"))
            attributes = {"brightness": str(rng.randint(1, 255))} if state == "on" else {}
        case "cover" | "valve":
            position = rng.choice((0, 100, rng.randint(1, 99)))
            state = "open" if position else "closed"
            attributes = {"current_position": str(position)} if rng.random() < 0.6 else {}
        case "lock":
            state = rng.choice(("locked", "unlocked"))
        case "climate":
            state = rng.choice(("heat", "cool", "off", "auto"))
            attributes = {"current_temperature": str(rng.randint(15, 28)), "temperature": str(rng.randint(16, 26))}
        case "media_player":
            state = rng.choice(("playing", "paused", "idle", "off"))
            if state == "playing":
                attributes = {
                    "media_title": rng.choice(("Dark Horizon", "Night Train", "Morning News", "Blue Hour")),
                    "volume_level": "0.4",
                }
        case "vacuum":
            state = rng.choice(("cleaning", "docked", "returning", "idle"))
        case "weather":
            state = rng.choice(("sunny", "rainy", "cloudy", "snowy", "windy", "partlycloudy"))
            attributes = {"temperature": str(rng.randint(-5, 32))}
        case "sensor":
            unit = "%" if "humid" in name or "battery" in name else "W" if "power" in name or "energy" in name else "°C"
            state, attributes = str(rng.randint(1, 90)), {"unit_of_measurement": unit}
        case _:
            state = rng.choice(("on", "off"))
    return replace(device, state=state, attributes=attributes)


def _state_text(device: Device) -> str:
    """A state as a sentence."""
    state, values = device.state, device.attributes
    if device.domain == "weather":
        sky = {"partlycloudy": "partly cloudy"}.get(str(state), state)
        return f"It is {sky} with {values['temperature']} degrees."
    return f"{_subject(device)} {_predicate(device)}."


def _subject(device: Device) -> str:
    return device.name if "'s" in device.name else f"The {device.name}"


def _predicate(device: Device) -> str:
    """What a sentence says of a device."""
    what, values = str(device.state), device.attributes
    match device.domain:
        case "climate":
            what = f"at {values['current_temperature']} degrees and set to {values['temperature']}"
        case "media_player" if "media_title" in values:
            what = f"playing {values['media_title']}"
        case "sensor":
            what = what + {"%": " percent", "°C": " degrees", "W": " watts"}[values["unit_of_measurement"]]
        case "light" if "brightness" in values:
            what = f"on at {round(float(values['brightness']) / 2.55)} percent"
        case "cover" | "valve" if values.get("current_position") not in {None, "0", "100"}:
            what = f"{values['current_position']} percent open"
    return f"{'are' if device.name.lower().endswith('lights') else 'is'} {what}"


def _clock(home: Home, rng: random.Random, *, training: bool) -> Row | None:
    """A question about the time or the date."""
    made = others.question(home, rng, training=training)
    if made is None or made.answer != [{"call": "GetDateTime"}]:
        return None
    hour, minute = rng.randrange(24), rng.randrange(60)
    day = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
    date = f"20{rng.randint(25, 30)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    clock = f"{hour:02}:{minute:02}"
    result = {
        "success": True,
        "result": {"date": date, "time": f"{clock}:{rng.randrange(60):02}", "timezone": "CET", "weekday": day},
    }
    asks_day = any(word in made.sentence for word in ("day", "date"))
    return _row(made, made.answer[0], result, f"It is {day}, {date}." if asks_day else f"It is {clock}.", rng)
