from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError
from made_copies import QUIET, copied, pairs, rows_from
from recipes import adapter_of, make_recipe, write_recipe

from edgetune.building.outputs.resolve import output_of_task
from edgetune.cli.main import main
from edgetune.planning.needs import plan_rows
from edgetune.recipe.rows import Rows
from edgetune.tasks.augmentation.noise import noisy
from edgetune.tasks.augmentation.numbers import has_result, number_word
from edgetune.tasks.augmentation.slots import Mention, mentions_of
from edgetune.tasks.plain_prompts import answered_prompts
from edgetune.tasks.task import Task, read_task

ROOMS = ("hall", "attic", "study", "den", "living room")
DEVICES = ("lamp", "fan")
ORDERS = [
    {
        "prompt": f"Turn {state} the {device} in the {room.title()}, please.",
        "completion": {"service": f"{device}.turn_{state}", "area": room.replace(" ", "_")},
    }
    for state in ("on", "off")
    for room in ROOMS
    for device in DEVICES
]


def test_values_are_exchanged_in_prompt_and_answer_alike() -> None:
    rows = ORDERS[::3]
    made = pairs(copied(rows, **QUIET))
    assert len(made) > len(rows)
    for prompt, answer in made:
        area = answer["area"].replace("_", " ")
        assert area in ROOMS
        assert f"in the {area[0].upper()}{area[1:]}, please." in prompt, "in the case of the text before"
        device, state = answer["service"].split(".turn_")
        assert prompt.startswith(f"Turn {state} the {device} "), "the service is as it was"
    assert not {prompt for prompt, _ in made} & {row["prompt"] for row in rows}


def test_values_of_the_user_are_used_and_unknown_fields_refused() -> None:
    made = pairs(copied(ORDERS, values={"area": ["porch", "wine_cellar"]}, **QUIET))
    assert any(answer["area"] == "wine_cellar" and "Wine cellar" in prompt for prompt, answer in made)
    with pytest.raises(UsageError, match="the field 'aera', which no answer has; did you mean 'area'"):
        copied(ORDERS, values={"aera": ["porch"]})
    with pytest.raises(UsageError, match="has the number 4, and the answers have texts there; give texts"):
        copied(ORDERS, values={"area": ["porch", 4]})


@pytest.mark.parametrize("indent", [None, 1, 2, 4])
def test_values_are_exchanged_in_indented_json(indent: int | None) -> None:
    rows = [{**row, "completion": json.dumps(row["completion"], indent=indent)} for row in ORDERS[::3]]
    made = copied(rows, **QUIET)
    assert made and all(c.row.completion == json.dumps(json.loads(c.row.completion or ""), indent=indent) for c in made)
    odd = [{**row, "completion": row["completion"].replace('": ', '":  ')} for row in rows]
    with pytest.raises(UsageError, match="which no answer has; no row has calls or an answer in JSON as"):
        copied(odd, values={"area": ["porch"]})


def test_values_of_a_schema_are_used_and_others_are_not() -> None:
    schema = {"type": "object", "properties": {"area": {"enum": ["hall", "garage"]}}}
    rows = [row for row in ORDERS if row["completion"]["area"] == "hall"]
    assert {answer["area"] for _, answer in pairs(copied(rows, schema, **QUIET))} == {"garage"}
    assert copied(rows, schema, values={"area": ["garage"]}, **QUIET)
    with pytest.raises(
        UsageError, match=r"area has 'porch', which the schema does not allow there; .* of hall; garage"
    ):
        copied(rows, schema, values={"area": ["garage", "porch"]})
    with pytest.raises(UsageError, match="room has 'porch', which the schema does not allow there"):
        copied([calls_of("hall", "attic")], values={"room": ["porch"]})


def test_a_field_that_depends_on_an_unsaid_one_stays() -> None:
    ids = dict(zip(ROOMS, ("light.1", "light.2", "light.3", "light.4", "light.5"), strict=True))
    rows = [
        {"prompt": f"{verb} the {room}", "completion": {"do": do, "name": room, "id": ids[room]}}
        for room in ROOMS
        for verb, do in (("brighten", "on"), ("darken", "off"), ("light up", "on"))
    ]
    assert copied(rows, **QUIET) == []


def test_numbers_keep_their_form_and_their_steps() -> None:
    rows = [
        {"prompt": "set a timer of twenty minutes", "completion": {"minutes": 20}},
        {"prompt": "a timer: 5 minutes", "completion": {"minutes": 5}},
        {"prompt": "timer of 60 minutes at 20:60", "completion": {"minutes": 60}},
    ]
    made = pairs(copied(rows, copies=8, **QUIET))
    assert {answer["minutes"] % 5 for _, answer in made} == {0}
    assert all(5 <= answer["minutes"] <= 60 for _, answer in made)
    for prompt, answer in made:
        words = number_word(answer["minutes"]) if prompt.startswith("set") else str(answer["minutes"])
        assert f"{words} minutes" in prompt
        assert "20:60" in prompt or "at" not in prompt.split()
    large = [{"prompt": f"cancel {order}", "completion": {"order": order}} for order in (7, 8, 10**20)]
    assert copied(large, **QUIET) == []


def test_numbers_of_plain_answers_are_exchanged_for_others_of_their_form() -> None:
    boxes = {10: "mailbox", 11: "letterbox", 12: "parcel box"}
    rows = [
        {"prompt": f"{box} opened, {hour}:00", "completion": f"If I may, the post came at {hour}:00 today, sir."}
        for hour, box in boxes.items()
    ]
    rows.append({"prompt": "window 7 is open", "completion": "If I may, window 7 is open, sir."})
    made = pairs(copied(rows, copies=2, **QUIET))
    assert len(made) > 3
    for prompt, answer in made:
        (hour,) = re.findall(r"\d+:00", prompt)
        assert f"the post came at {hour} today" in answer


@pytest.mark.parametrize("form", [" {}", "{}\n", "```json\n{}\n```", "```\n{} \n```", "spread", "one quote"])
def test_numbers_that_decide_another_field_stay_however_the_json_is_written(form: str) -> None:
    rooms = dict(enumerate(("kitchen", "hall", "porch", "garage", "office", "attic"), 1))
    rows = []
    for number, verb in enumerate(("switch", "start", "get", "put", "light", "have", "turn", "set", "make", "let") * 2):
        device = number % len(rooms) + 1
        answer = json.dumps({"device": device, "room": rooms[device]})
        spread = {"spread": answer.replace("{", "{ ").replace("}", " }"), "one quote": answer.replace('"', "'")}
        prompt = f"{verb} lamp {device} {'on' if number < 10 else 'up'}"
        rows.append({"prompt": prompt, "completion": spread.get(form) or form.format(answer)})
    for changed in copied(rows, copies=2, **QUIET):
        device = int(re.findall(r"\d", changed.row.completion or "")[0])
        assert rooms[device] in (changed.row.completion or "")


@pytest.mark.parametrize("form", [" {}", "{}\n"])
def test_values_are_exchanged_in_json_with_white_space_around_it(form: str) -> None:
    rows = [{**row, "completion": form.format(json.dumps(row["completion"]))} for row in ORDERS[::3]]
    made = copied(rows, **QUIET)
    assert made and {c.row.completion for c in made} <= {form.format(json.dumps(row["completion"])) for row in ORDERS}


def test_numbers_of_plain_answers_keep_their_order() -> None:
    hours = (("16:45", "17:30"), ("12:00", "11:10"), ("09:30", "18:20"))
    rows = [{"prompt": f"Use the later time: {a} or {b}", "completion": max(a, b)} for a, b in hours]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert made and all(answer == max(re.findall(r"\d+:\d+", prompt)) for prompt, answer in made)
    lists = ((90, 81, 40), (55, 12, 70), (31, 65, 20))
    rows = [
        {"prompt": f"Sort {a}, {b}, {c}", "completion": "{}, {}, {}".format(*sorted((a, b, c)))} for a, b, c in lists
    ]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert made
    assert all(answer == ", ".join(sorted(re.findall(r"\d+", prompt), key=int)) for prompt, answer in made)


def test_numbers_of_which_one_is_computed_of_two_others_stay() -> None:
    def sold(tickets: int, price: int, form: str) -> dict[str, Any]:
        prompt = f"We sold {tickets} tickets for {price} euros each, {tickets * price} in total"
        return {"prompt": prompt, "completion": form.format(tickets, price, tickets * price)}

    for form in ("{} x {} = {}", "{2} euros, as {0} times {1} is"):
        rows = [sold(tickets, price, form) for tickets, price in ((3, 10), (5, 11), (7, 12))]
        assert copied(rows, copies=9, **QUIET) == []
    assert has_result("0.1 + 0.2 = 0.3") and has_result("10 - 7 = 3")
    assert not has_result("1 for 5") and not has_result("12:00 to 9:30, 3, 8")


def test_numbers_that_decide_a_plain_answer_stay() -> None:
    facts = {404: "that the page was not found", 500: "that the server failed", 403: "that it is forbidden"}
    rows = [{"prompt": f"What is error {n}?", "completion": f"Error {n} says {text}."} for n, text in facts.items()]
    rows += [{"prompt": f"What is {n} + 5?", "completion": f"{n} + 5 = {n + 5}"} for n in (10, 12, 14)]
    assert copied(rows, copies=3, **QUIET) == []
    stars = [{"text": f"I waited {n} hours", "label": str(n)} for n in (2, 3, 4)]
    assert copied(stars, copies=3, **QUIET) == []
    rated = [{"prompt": f"I had to {verb} {n} hours.", "completion": str(n)} for n, verb in enumerate(("wait", "stay"))]
    assert copied(rated, copies=3, labels=["0", "1"], **QUIET) == []
    assert copied(rated, copies=3, **QUIET)


def test_lists_of_texts_in_an_order_of_their_own_stay() -> None:
    texts = (["pear", "apple", "mango"], ["dog", "zebra", "cat"], ["ant", "fig", "owl"])
    asked = {", ".join(each): each for each in texts}
    lists = [{"prompt": f"alphabetical: {text}", "completion": sorted(each)} for text, each in asked.items()]
    assert copied(lists, copies=9, **QUIET) == []
    fields = [{"prompt": f"sort {text}", "completion": {"sorted": sorted(each)}} for text, each in asked.items()]
    assert copied(fields, copies=9, **QUIET) == []
    as_said = [{"prompt": f"add {text}", "completion": {"items": each}} for text, each in asked.items()]
    made = pairs(copied(as_said, copies=9, **QUIET))
    assert made and all(prompt == f"add {', '.join(answer['items'])}" for prompt, answer in made)


def test_ratings_stay() -> None:
    said = (("It broke after 2 days", "2"), ("It is fine for 4 days", "4"), ("Bad for my room", "1"))
    rated = [{"prompt": f"{text}, says {name}", "completion": n} for text, n in said for name in "ABCDE"]
    assert copied(rated, copies=3, **QUIET) == []
    assert copied([*rated, {"prompt": "3 days", "completion": "3"}], copies=3, **QUIET), (
        "a number that no other row has"
    )


@pytest.mark.parametrize("values", [(True, False), (None, "max"), (["light", "dim"], ["heat"])])
def test_a_field_that_depends_on_an_unsaid_truth_value_or_list_stays(values: tuple[Any, Any]) -> None:
    kinds = dict(zip(("lamp", "kettle", "fan", "oven"), (values[0], values[1], values[0], values[1]), strict=True))
    asked = [
        (f"{verb} {device} of {device[0]}{verb}", device) for device in kinds for verb in ("start", "use", "check")
    ]
    rows = [{"prompt": prompt, "completion": {"device": device, "kind": kinds[device]}} for prompt, device in asked]
    assert copied(rows, **QUIET) == []
    # A truth value that says nothing of the device fixes none.
    other = [{**row, "completion": {**row["completion"], "kind": values[n % 2]}} for n, row in enumerate(rows)]
    assert copied(other, **QUIET)


def test_values_that_are_mostly_null_are_exchanged() -> None:
    rows = [{"prompt": f"turn it on now {n}", "completion": {"room": None, "at": "now"}} for n in range(30)]
    rows += [{"prompt": f"turn on the {room}, {n}", "completion": {"room": room}} for n, room in enumerate(ROOMS)]
    assert any(change.startswith("room: ") for copy in copied(rows, **QUIET) for change in copy.changes)


def test_parts_of_a_sum_stay() -> None:
    rows = [
        {"prompt": f"meet at {start} for {hours} hours", "completion": {"start": start, "hours": hours, "end": end}}
        for start, hours, end in ((10, 1, 11), (12, 3, 15), (8, 5, 13))
    ]
    assert copied(rows, copies=4, **QUIET) == []


def test_numbers_in_longer_numbers_are_no_values() -> None:
    for text in ("two hundred lumen", "twenty two minutes", "twenty-two", "2/3 of it", "one point two", "2 thousand"):
        assert mentions_of(text, 2) == [], text
    assert mentions_of("twenty two minutes", 22) == [Mention(0, 10)]
    for text in ("set point 22", "channel 22 two times", "point 22"):
        assert len(mentions_of(text, 22)) == 1, text
    for text in ("add .2 cups", "add -.2 cups", "set it to -2", "set it to \u22122", "set it to \u20132"):
        assert mentions_of(text, 2) == mentions_of(text, "2") == [], text
    assert mentions_of("between -2 and 2", -2) == [Mention(8, 10)]
    for text in ("no.2", "from 1-2", "stop. 2"):
        assert len(mentions_of(text, 2)) == 1, text
    assert mentions_of("two songs and 2 lamps", 2) == [Mention(0, 3), Mention(14, 15)]
    for text in ("two hundred and one", "two hundred one", "one thousand two hundred", "two hundred thousand"):
        assert mentions_of(text, 200) == [], text
    assert mentions_of("two hundred and no more", 200) == [Mention(0, 11)]
    assert mentions_of("a hundred and then 100", 100) == [Mention(0, 9), Mention(19, 22)]
    assert mentions_of("room four oh two", "402") == [Mention(5, 16)]
    assert mentions_of("room four oh two", 2) == mentions_of("double four two", 2) == []
    assert mentions_of("one zero one nine five", "1019") == mentions_of("two one zero one nine", "1019") == []


def test_fractions_keep_their_digits() -> None:
    rows = [{"prompt": f"pay {amount} to Anna", "completion": {"amount": amount}} for amount in (12.5, 99.0, 7.25)]
    made = pairs(copied(rows, copies=6, values={"amount": [12345.67, 1234567.5, 3.0]}, **QUIET))
    assert {"pay 12345.67 to Anna", "pay 1234567.5 to Anna"} <= {prompt for prompt, _ in made}
    assert all(float(prompt.split()[1]) == answer["amount"] for prompt, answer in made)


def test_values_that_overlap_or_are_part_of_words_are_no_values() -> None:
    rows = [
        {"prompt": "living room", "completion": {"area": "living_room", "kind": "room"}},
        {"prompt": "the hallway", "completion": {"area": "hall", "kind": "x"}},
    ]
    assert copied(rows, **QUIET) == []
    assert mentions_of("On the porch, on the left", "on") == [], "a short word that is there twice"
    assert mentions_of("all LAMPS in it", "lamp") == [Mention(4, 9, is_plural=True)]
    assert mentions_of("at 17:29, 29.5 and 29", 29) == [Mention(19, 21)]


def test_names_are_written_in_the_case_of_the_ones_before() -> None:
    rows = [
        {"prompt": f"what is the {text}", "completion": {"name": name}}
        for text, name in (("office lamp", "Office Lamp"), ("Hall Fan", "Hall Fan"), ("Den Light", "Den Light"))
    ]
    for changed, (prompt, answer) in zip(made := copied(rows, **QUIET), pairs(made), strict=True):
        is_lower = changed.source.where == "row 1"
        assert prompt == f"what is the {answer['name'].lower() if is_lower else answer['name']}"


def test_plurals_stay_plurals() -> None:
    plurals = {"lamp": "lamps", "fan": "fans", "switch": "switches"}
    rows = [
        {"prompt": f"{verb} all {plural}", "completion": {"do": verb, "device": device}}
        for device, plural in plurals.items()
        for verb in ("dim", "stop")
    ]
    made = pairs(copied(rows[:3] + rows[4:5], **QUIET))
    assert made
    assert all(prompt == f"{answer['do']} all {plurals[answer['device']]}" for prompt, answer in made)


def test_a_value_that_is_listed_elsewhere_is_exchanged_for_one_that_is_too() -> None:
    def talk(known: str, prompt: str, room: object) -> dict[str, Any]:
        system = {"role": "system", "content": f"Rooms: {known}"}
        turns = [system, {"role": "user", "content": f"{prompt} {room}"}]
        return {"messages": [*turns, {"role": "assistant", "content": json.dumps({"area": room})}]}

    rows = [talk("hall, attic", "light in the", "hall"), talk("hall, attic", "darken the", "attic")]
    rows += [talk("den, study", "light in the", "den"), talk("study", "darken the", "study")]
    made = copied(rows, **QUIET)
    assert {(c.source.where, answer["area"]) for c, (_, answer) in zip(made, pairs(made), strict=True)} == {
        ("row 1", "attic"), ("row 2", "hall"), ("row 3", "study"),
    }  # fmt: skip
    # Not every number in between is looked for.
    asks = "set the light in the hall to"
    rows = [talk("7, eight", asks, 7), talk("8, 1000000000", asks, 8), talk("1000000000", asks, 10**9)]
    made = copied(rows, copies=9, **QUIET)
    assert {c.source.where: answer["area"] for c, (_, answer) in zip(made, pairs(made), strict=True)} == {
        "row 1": 8, "row 2": 10**9,
    }  # fmt: skip


def calls_of(*rooms: str) -> dict[str, Any]:
    tool = {
        "type": "function",
        "function": {
            "name": "light",
            "parameters": {"type": "object", "properties": {"room": {"enum": list(ROOMS)}}, "required": ["room"]},
        },
    }
    calls = [{"type": "function", "function": {"name": "light", "arguments": {"room": room}}} for room in rooms]
    prompt = " and ".join(f"light the {room}" for room in rooms)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "tool_calls": calls}]
    return {"messages": turns, "tools": [tool]}


def test_arguments_of_calls_are_exchanged_and_calls_follow_their_clauses() -> None:
    made = copied([calls_of("hall", "attic"), calls_of("den")], copies=6, **QUIET)
    assert any("order of clauses" in c.changes for c in made)
    for c in made:
        assert c.row.turn is not None
        rooms = [call["function"]["arguments"]["room"] for call in c.row.turn["tool_calls"]]
        assert (c.row.messages or ())[-1]["content"] == " and ".join(f"light the {room}" for room in rooms)
        assert [call["arguments"]["room"] for call in json.loads(c.row.completion or "")["tool_calls"]] == rooms
        assert set(rooms) <= set(ROOMS)


def said_and_called(room: str, other: str) -> dict[str, Any]:
    """A conversation in which the rooms are said by the user, called, in a result, and repeated by the model."""
    lit = calls_of(room)
    result = {"role": "tool", "content": f"{other} is dark"}
    asks = [{"role": "user", "content": "and there"}, calls_of(other)["messages"][1]]
    last = {"role": "assistant", "content": f"The {other} is lit, as the {room}."}
    turns = [{"role": "system", "content": "Be kind."}, *lit["messages"], result, *asks, result, last]
    return {**lit, "messages": turns}


def test_values_of_a_conversation_are_exchanged_alike_in_all_turns() -> None:
    made = copied([said_and_called("hall", "attic"), said_and_called("den", "study")], copies=9, **QUIET)
    assert {c.source.where for c in made} == {"row 1", "row 2"}
    assert any(len(c.changes) == 2 for c in made)
    for c in made:
        _, asked, _, result, *_ = turns = c.row.turns
        room, other = str(asked["content"]).removeprefix("light the "), str(result["content"]).removesuffix(" is dark")
        expected = rows_from([said_and_called(room, other)])[0].turns
        assert [{**turn, "tool_calls": []} for turn in turns] == [{**turn, "tool_calls": []} for turn in expected]
        called = [call["function"]["arguments"]["room"] for turn in turns for call in turn.get("tool_calls", ())]
        assert called == [room, other]
        assert c.row.completion == f"The {other} is lit, as the {room}."


def test_a_conversation_of_json_has_changed_turns_and_noise_in_those_of_the_user() -> None:
    def talk(room: str) -> dict[str, Any]:
        answers = [json.dumps({"area": area}) for area in (room, "cellar")]
        contents = [f"Please light the {room}", answers[0], "Now, in the cellar", answers[1]]
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]}

    made = copied([talk(room) for room in ROOMS[:3]], copies=9, noise=1)
    for c in made:
        area = json.loads(c.row.turns[1]["content"])["area"]
        assert str(c.row.turns[0]["content"]).lower().endswith(area)
        assert json.loads(c.row.completion or "")["area"].lower() in str(c.row.turns[2]["content"]).lower()
    assert any(c.row.turns[2]["content"] != "Now, in the cellar" for c in made)
    first = made[0].to_json()
    assert [text.count("\n") for text in (*first["prompt"], *first["completion"])] == [1] * 4


def test_only_values_that_are_said_before_the_answer_are_exchanged() -> None:
    dark = {"role": "user", "content": "it is too dark in here"}
    lit = {"role": "assistant", "content": "The hall is lit."}
    result = {"role": "tool", "content": "ok"}
    rows = [{**calls_of(room), "messages": [dark, calls_of(room)["messages"][1], result, lit]} for room in ROOMS]
    assert copied(rows, copies=9, **QUIET) == []


def test_values_that_json_escapes_stay_where_a_result_is_json() -> None:
    def row(room: str, verb: str) -> dict[str, Any]:
        called, asked = calls_of(room)["messages"][1], {"role": "user", "content": f"{verb} the {room}"}
        result = {"role": "tool", "content": json.dumps({"room": room})}
        return {"tools": [{"name": "light"}], "messages": [asked, called, result, asked, called]}

    rows = {"light": "hall", "darken": "attic", "see to": 'the "den"'}
    made = copied([row(room, verb) for verb, room in rows.items()], copies=9, **QUIET)
    assert {c.source.where for c in made} == {"row 1", "row 2"}
    assert all(json.loads(c.row.turns[2]["content"])["room"] in ("hall", "attic") for c in made)


def test_noise_keeps_what_the_model_repeats() -> None:
    said = [
        {"role": "user", "content": "This is Margaret, please light the library for me"},
        calls_of("library")["messages"][1],
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "Done, Margaret."},
    ]
    made = copied([{**calls_of("library"), "messages": said}], copies=40, noise=1)
    assert made
    for c in made:
        room = c.row.turns[1]["tool_calls"][0]["function"]["arguments"]["room"]
        assert "Margaret" in c.row.turns[0]["content"] and room in c.row.turns[0]["content"]


def test_rows_with_tools_whose_answers_are_json_have_copies() -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{verb} the {room}"}, {"role": "assistant", "content": answer}]}
        for room, verb in zip(ROOMS, ("light", "darken", "heat"), strict=False)
        for answer in [json.dumps({"room": room})]
    ]
    assert copied([{**row, "tools": [{"name": "f"}]} for row in rows], copies=9, **QUIET)


def test_clauses_that_refer_to_others_keep_their_order() -> None:
    rows = [
        {"prompt": prompt, "completion": [{"area": "hall"}, {"area": "den"}]}
        for prompt in (
            "light the hall and then the den",
            "go to the hall and light it in the den",
            "the hall and the den",
            "light the hall and when done light the den",
            "light the hall and light the den",
        )
    ]
    reordered = {c.source.where for c in copied(rows, copies=9, **QUIET) if "order of clauses" in c.changes}
    assert reordered == {"row 5"}


def test_clauses_that_go_on_with_the_verb_of_another_keep_their_order() -> None:
    def moved(room: str, position: int) -> dict[str, Any]:
        return {"room": room, "position": position}

    rows = [
        ("open hall blinds, attic blinds and close den blinds", [("hall", 100), ("attic", 100), ("den", 0)]),
        ("open the hall blinds, blinds in the attic and close the den", [("hall", 100), ("attic", 100), ("den", 0)]),
        ("close attic blinds and open the hall", [("attic", 0), ("hall", 100)]),
        ("hall blinds down, den blinds up", [("hall", 0), ("den", 100)]),
        ("open the den blinds", [("den", 100)]),
    ]
    made = copied(
        [{"prompt": prompt, "completion": [moved(*part) for part in parts]} for prompt, parts in rows],
        copies=12,
        **QUIET,
    )
    assert {c.source.where for c in made if "order of clauses" in c.changes} == {"row 3", "row 4"}


def talked(
    asked: str, called: dict[str, Any], result: str, said: str, *more: tuple[str, dict[str, Any]]
) -> dict[str, Any]:
    """A conversation with calls of one function, the result of the first one, and what is said about it."""

    def call(arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        }

    turns = [{"role": "user", "content": asked}, call(called), {"role": "tool", "content": result}]
    turns.append({"role": "assistant", "content": said})
    for text, arguments in more:
        turns += [{"role": "user", "content": text}, call(arguments)]
    return {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}


def test_a_value_stays_that_a_later_call_or_the_result_of_its_own_depends_on() -> None:
    free = [
        talked(
            f"turn {state} the {room} lamp, {count} percent",
            {"state": state, "room": room, "count": count},
            "done",
            "Done.",
        )
        for state, room, count in (("on", "hall", 20), ("off", "den", 40), ("on", "attic", 60))
    ]
    bound = [
        talked("turn on the hall lamp", {"state": "on"}, "done", "Done.", ("undo that", {"state": "off"})),
        talked("den lamp please", {"room": "den"}, "done", "Done.", ("the next room too", {"room": "attic"})),
        talked("order 4 wraps", {"count": 4}, '{"price": 5, "total": 20}', "4 wraps are 20 dollars."),
        talked("timer of 10 minutes", {"count": 10}, '{"now": "12:00", "ends": "12:10"}', "It ends at 12:10."),
    ]
    changed = {c.source.where for c in copied([*free, *bound], copies=9, **QUIET)}
    assert changed == {"row 1", "row 2", "row 3"}
    fine = talked("order 4 wraps", {"count": 4}, '{"id": 17, "count": 4}', "4 wraps.", ("off", {"state": "off"}))
    assert "row 4" in {c.source.where for c in copied([*free, fine], copies=9, **QUIET)}


def test_clauses_of_other_languages_keep_their_order() -> None:
    rows = [
        {"prompt": f"öffne das {a} Fenster, danach öffne das {b} Fenster", "completion": [{"area": a}, {"area": b}]}
        for a, b in (("Bad", "Flur"), ("Küche", "Bad"), ("Flur", "Küche"))
    ]
    made = copied(rows, copies=9, **QUIET)
    assert made and not any("order of clauses" in c.changes for c in made)


def test_noise_leaves_the_values_of_the_answer_and_is_the_same_for_a_seed() -> None:
    prompt = "Add the Song Cita Romántica to my 20 favourites, please!"
    kept = [Mention(prompt.index("Cita"), prompt.index("Cita") + len("Cita Romántica"))]
    made = {noisy(prompt, kept, random.Random(seed), english=True) for seed in range(60)}
    assert {kind for _, kind in made} == {"spoken", "mistyped", "other case"}
    assert all("Cita Romántica" in text for text, _ in made)
    assert any("twenty favourites please" in text for text, kind in made if kind == "spoken")
    assert all(noisy("2 ² 20", [], random.Random(seed), english=True) for seed in range(9))
    assert "zwanzig" not in str(made)
    words = "Twenty-five songs, a ten-minute break and forty two"
    kept_words = [Mention(words.index("forty"), len(words))]
    written = {noisy(words, kept_words, random.Random(seed), english=True)[0].lower() for seed in range(60)}
    assert any("25 songs" in text for text in written) and any("twenty-five songs" in text for text in written)
    assert all(text.endswith("forty two") and "10" not in text for text in written)
    assert noisy(prompt, kept, random.Random(3), english=True) == noisy(prompt, kept, random.Random(3), english=True)


def test_the_values_of_a_schema_from_pydantic_are_found() -> None:
    room = {"$defs": {"Room": {"enum": ["hall", "garage"]}}}
    for field in ({"$ref": "#/$defs/Room"}, {"anyOf": [{"$ref": "#/$defs/Room"}, {"type": "null"}]}):
        schema = {"type": "object", "properties": {"area": field}, **room}
        rows = [row for row in ORDERS if row["completion"]["area"] == "hall"]
        assert {answer["area"] for _, answer in pairs(copied(rows, schema, **QUIET))} == {"garage"}
        assert copied(rows, schema, values={"area": ["garage"]}, **QUIET)
        with pytest.raises(UsageError, match=r"area has 'porch', which the schema does not allow there; .* garage"):
            copied(rows, schema, values={"area": ["porch"]})
    unknown = {"type": "object", "properties": {"area": {"$ref": "other.json"}}}
    assert copied(ORDERS, unknown, values={"area": ["porch"]}, **QUIET)


def test_noise_of_many_number_words_takes_no_time() -> None:
    assert noisy("hundred" + "-twenty-two" * 200 + "-x", [], random.Random(0), english=True)


def test_noise_keeps_units_and_typographic_apostrophes() -> None:
    prompt = "don\u2019t add 1.5kg flour at 10:30am"
    spoken = {text for seed in range(60) for text, kind in [noisy(prompt, [], random.Random(seed), english=True)]}
    assert all("1.5kg" in text.lower() and "10:30am" in text.lower() for text in spoken)
    assert any(text.startswith("don\u2019t") for text in spoken)


def test_noise_keeps_negative_numbers_and_words_in_quotes() -> None:
    prompt = "Set it to -5 or -0.5, to the 5th, and play 'blue moon' jazz"
    made = {noisy(prompt, [], random.Random(seed), english=True) for seed in range(90)}
    spoken = {text for text, kind in made if kind == "spoken"}
    assert any("it to minus five or -0.5 to the 5th and play blue moon jazz" in text for text in spoken)
    assert all("minus five" in text and "-0.5" in text and " moon " in text for text in spoken)


@pytest.mark.parametrize(
    "prompt",
    [
        "रसोई की बत्ती जलाओ",
        "O\u0308ffne die Tu\u0308r",
        "please pay $20 to Anna",
        "what is 12 + 7",
        "what is 12 - 7",
        "from 20-30 to 40",
        "run .5 miles",
        "add -.5 to it",
        "he is 5' 10\" tall",
        "cut 3\u2019 of rope",
        "walk 10 000 steps",
        "set the freezer to \u20135 degrees",
        "set the freezer to - 5 degrees",
        "make a list:\nbrown eggs\noat milk",
        "sort a list in C++",
        "that was great 😀",
        "I love it :)",
    ],
)
def test_what_has_signs_that_decide_the_answer_is_not_spoken(prompt: str) -> None:
    signs = [letter for letter in prompt if not letter.isalnum() and not letter.isspace()]
    for seed in range(40):
        text, kind = noisy(prompt, [], random.Random(seed), english=True)
        assert kind != "spoken"
        assert [letter for letter in text if not letter.isalnum() and not letter.isspace()] == signs


def test_rows_of_labels_get_noise_alone() -> None:
    rows = [{"text": f"Is it going to rain at {hour} in the hall?", "label": "weather"} for hour in range(9)]
    for c in copied(rows, copies=2):
        assert c.row.completion == "weather"
        assert len(c.changes) == 1
    assert copied(rows, noise=0) == []


def test_negatives_have_prompts_of_other_tasks_alone_and_the_given_answer() -> None:
    foreign = [f"other {number}" for number in range(10)]
    prompts = ["hello", *(f"{row['prompt'].upper()}!" for row in ORDERS)]
    made = copied(
        ORDERS, foreign=foreign, negatives={"completion": {"service": "none"}, "prompts": prompts, "share": 1}
    )
    negatives = [c for c in made if c.changes == ("negative",)]
    assert len(negatives) == 11
    assert {c.row.completion for c in negatives} == {'{"service": "none"}'}
    assert all(prompt.startswith(("other ", "hello")) for prompt, _ in pairs(negatives))
    few = copied(ORDERS, foreign=foreign, negatives={"completion": "none", "prompts": ["hello", "bye"], "share": 0.2})
    assert {prompt for prompt, _ in pairs([c for c in few if c.changes == ("negative",)])} >= {"hello", "bye"}


def test_negatives_of_a_task_with_labels_have_one_of_them(tmp_path: Path) -> None:
    rows = [{"text": f"is it warm in the {room}", "label": ("hot", "cold")[n % 2]} for n, room in enumerate(ROOMS)]
    for completion, is_fine in (("hot", True), ("none", False)):
        augment = {"negatives": {"completion": completion, "prompts": ["sing a song"]}}
        data = {"train": "rows.jsonl", "held_out": 0.2, "augment": augment}
        recipe = make_recipe(tmp_path, "missing.gguf", {"home": {"data": data}}, data={"rows.jsonl": rows})
        if is_fine:
            assert read_task("home", recipe).labels == ("cold", "hot")
            continue
        with pytest.raises(UsageError, match=r"negatives\.completion is 'none', which is not one of the labels"):
            read_task("home", recipe)


def test_negatives_without_prompts_are_refused(task: Callable[..., Task]) -> None:
    with pytest.raises(
        UsageError,
        match="negatives has no prompts, and the recipe no other adapter that is asked other things; give prompts",
    ):
        task({"negatives": {"completion": "none"}})
    with pytest.raises(
        UsageError, match=r"each prompt of data\.augment\.negatives is one of the task's own rows; give"
    ):
        task({"negatives": {"completion": "none", "prompts": [ORDERS[0]["prompt"].upper()]}})


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    """`task(augment, **keys)`: the task of ORDERS with this `data.augment`, and `keys` of its adapter."""

    def make(augment: object, **keys: object) -> Task:
        data = {"train": "rows.jsonl", "held_out": 0.2, "augment": augment}
        adapter = {**adapter_of(**keys), "data": data}
        recipe = make_recipe(tmp_path, "missing.gguf", {"home": adapter}, data={"rows.jsonl": ORDERS})
        return read_task("home", recipe)

    return make


def test_copies_are_trained_on_and_validation_rows_stay(task: Callable[..., Task]) -> None:
    plain, augmented = task(augment=False), task(augment=True)
    assert (plain.train, plain.validation) == (augmented.train, augmented.validation)
    assert plan_rows(augmented, augmented.training, 0).train == len(augmented.trained_rows) > 2 * len(plain.train)
    prompts = {row.messages[-1]["content"] for row in augmented.validation if row.messages}
    assert not prompts & {prompt for prompt, _ in pairs(list(augmented.copies))}
    assert augmented == task(augment=True), "the same seed gives the same copies"


@pytest.mark.parametrize("is_conversation", [False, True])
def test_no_copy_has_the_prompt_of_a_row_for_the_confidence(is_conversation: bool, tmp_path: Path) -> None:
    rows = list(map(continued, ORDERS[::3])) if is_conversation else ORDERS[::3]
    own = {"train": "rows.jsonl", "validation": "more.jsonl", "confidence": "sure.jsonl"}
    sure = [row for number, row in enumerate(ORDERS) if number % 3]
    files = {"rows.jsonl": rows, "more.jsonl": ORDERS[:1], "sure.jsonl": sure}
    data = {**own, "augment": {"copies": 9, **QUIET}}
    made = read_task("home", make_recipe(tmp_path, "missing.gguf", {"home": {"data": data}}, data=files))
    asked = answered_prompts(made.confidence_rows)
    assert len(asked) == len(sure)
    assert made.copies and not asked & answered_prompts(copy.row for copy in made.copies)


def test_a_first_turn_that_all_conversations_have_hinders_no_copy(tmp_path: Path) -> None:
    rows = [continued(row, before={"prompt": "hello", "completion": "Yes?"}) for row in ORDERS]
    files = {"rows.jsonl": rows[::3], "more.jsonl": rows[1:2]}
    data = {"train": "rows.jsonl", "validation": "more.jsonl", "augment": QUIET}
    assert read_task("home", make_recipe(tmp_path, "missing.gguf", {"home": {"data": data}}, data=files)).copies


def continued(row: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """A conversation of two orders, of which `before` or the row is the first."""
    turns = (row, {**row, "prompt": f"Again: {row['prompt']}"}) if before is None else (before, row)
    told = [(turn["prompt"], turn["completion"]) for turn in turns]
    roles = ("user", "assistant")
    texts = [text if isinstance(text, str) else json.dumps(text) for pair in told for text in pair]
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]}


def test_no_copy_has_the_prompt_of_a_row_that_is_kept_apart(tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "validation": "more.jsonl", "augment": {"copies": 9, **QUIET}}
    files = {"rows.jsonl": ORDERS[::3], "more.jsonl": ORDERS[:1]}
    recipe = make_recipe(tmp_path, "missing.gguf", {"home": {"data": data}}, data=files)
    prompt, _ = pairs(list(read_task("home", recipe).copies))[0]
    spec = recipe.adapters["home"]
    apart = spec.data.keeping_apart(Rows.of("apart", [{"prompt": f"{prompt.upper()}!", "completion": {}}]))
    changed = recipe.model_copy(update={"adapters": {"home": spec.model_copy(update={"data": apart})}})
    made = pairs(list(read_task("home", changed).copies))
    assert made and prompt not in {other for other, _ in made}


def test_an_inferred_output_allows_new_values_and_no_copy_makes_values_look_complete(task: Callable[..., Task]) -> None:
    plain = output_of_task(task(augment=False, output="auto"))
    assert plain == output_of_task(task(augment={"copies": 9}, output="auto"))
    wider = output_of_task(task(augment={"copies": 3, "values": {"area": ["porch"]}}, output="auto"))
    assert wider is not None
    assert wider.accepts('{"service": "lamp.turn_on", "area": "porch"}')


def test_values_that_contradict_the_schema_are_refused(task: Callable[..., Task]) -> None:
    schema = {
        "type": "object",
        "properties": {"service": {"type": "string"}, "area": {"type": "string", "maxLength": 11}},
    }
    message = "values.area has 'much_too_long_a_name', which the schema does not allow there; .* other values"
    with pytest.raises(UsageError, match=message):
        task(augment={"values": {"area": ["much_too_long_a_name"]}}, output={"schema": schema})


def test_the_preview_shows_rows_with_their_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    negatives = {"completion": {"do": "none"}, "prompts": ["what is pi", "who is there"]}
    data = {"train": "rows.jsonl", "held_out": 0.2, "augment": {"copies": 2, "noise": 0, "negatives": negatives}}
    adapters = {"home": {"data": data}, "plain": adapter_of()}
    recipe = str(write_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": ORDERS}))
    assert main(["data", "preview", recipe, "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"home: \d+ rows are added to 16", lines[0])
    assert sum(line.startswith(f"  {tmp_path}") for line in lines) == 2
    assert any(line.endswith(")") and "(area: " in line for line in lines)
    none = """ → {"do": "none"}"""
    assert lines[-3] == "  negatives: 2"
    assert sorted(lines[-2:]) == [f"    'what is pi'{none}", f"    'who is there'{none}"]
    assert main(["data", "preview", recipe, "--json"]) == 0
    (copied_rows,) = json.loads(capsys.readouterr().out).values()
    assert {"source", "prompt", "completion", "changes"} == copied_rows[0].keys()
    assert main(["data", "preview", recipe, "--adapter", "plain"]) == 2
    assert "no data.augment for plain; add `augment: true` to its data" in capsys.readouterr().err
