from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from made_copies import QUIET, copied, pairs, rows_from

from edgetune.recipe.data import AugmentSpec
from edgetune.tasks.augmentation.copies import copies_of
from edgetune.tasks.augmentation.numbers import digit_words, number_word, order, said_numbers
from edgetune.tasks.data import TaskRow


def asked(prompt: str, **answer: object) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer}


def test_the_name_of_a_function_is_exchanged_only_for_one_with_the_same_fields() -> None:
    timers = [asked(f"set timer {n} minutes", function="set_timer", minutes=n) for n in (5, 10)]
    calls = [asked(f"call {name}", function="call", name=name) for name in ("anna", "bob")]
    lamps = [asked(f"turn {do} the {what}", function=f"turn_{do}", device=what) for do, what in (("on", "fan"),)]
    for rows in (timers[:1] + calls[:1] + lamps, timers + calls + lamps):
        made = pairs(copied(rows, copies=9, **QUIET))
        assert all(prompt.startswith(answer["function"].replace("_", " ")) for prompt, answer in made)
        assert all(("minutes" in answer) == (answer["function"] == "set_timer") for _, answer in made)
        assert all(("name" in answer) == (answer["function"] == "call") for _, answer in made)
    mixed = [asked(f"light the {room}", function="light", area=room) for room in ("hall", "attic")]
    mixed += [
        asked(f"light the {room} at {n}", function="light", area=room, at=n) for room, n in (("den", 5), ("bar", 8))
    ]
    assert {answer["area"] for _, answer in pairs(copied(mixed, copies=9, **QUIET)) if "at" not in answer} > {"den"}


def test_values_of_rows_with_other_unsaid_fields_are_not_used_unless_rows_show_that_they_fit() -> None:
    cities = {"Paris": "FR", "Lyon": "FR", "Berlin": "DE", "Munich": "DE", "Rome": "IT", "Milan": "IT"}
    rows = [asked(f"{n} days in {city}", city=city, country=land) for n, (city, land) in enumerate(cities.items())]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert made and all(cities[answer["city"]] == answer["country"] for _, answer in made)
    rooms = [("hall", "warm"), ("hall", "cold"), ("den", "cold"), ("den", "warm"), ("attic", "warm")]
    asks = [
        asked(f"is it {'hot' if kind == 'warm' else 'ice'} in the {room}", room=room, kind=kind) for room, kind in rooms
    ]
    assert ("is it ice in the attic", {"room": "attic", "kind": "cold"}) in pairs(copied(asks, copies=9, **QUIET))
    sizes = [asked(f"set {what} to {n}", name=f"{what}_of_it", value=n) for what, n in (("heat", 18), ("heat", 24))]
    sizes += [asked(f"set sound to {n}", name="sound_of_it", value=n) for n in (60, 90)]
    made = pairs(copied(sizes, copies=9, **QUIET))
    assert all(18 <= answer["value"] <= 24 for prompt, answer in made if "heat" in prompt)


def test_a_field_that_depends_on_one_stays_where_the_prompt_does_not_say_that_one() -> None:
    cities = {"Paris": "France", "Lyon": "France", "Rome": "Italy", "Milan": "Italy", "Oslo": "Norway"}
    rows = [
        asked(f"{what} in {city}{place}", what=what, city=city, country=land)
        for city, land in cities.items()
        for what, place in (("rain", ""), ("wind", f", {land}"), ("snow", f", {land}"))
    ]
    made = pairs(copied(rows, copies=9, **QUIET))
    unsaid = [(prompt, answer) for prompt, answer in made if answer["country"] not in prompt]
    assert {prompt for prompt, _ in unsaid} == {f"{what} in {city}" for what in ("wind", "snow") for city in cities}
    assert all(cities[answer["city"]] == answer["country"] for _, answer in unsaid)
    assert any(cities[answer["city"]] != answer["country"] for _, answer in made)
    named = pairs(copied(rows, copies=9, values={"city": ["Nice"]}, **QUIET))
    assert {"rain in Nice", "wind in Nice, Norway"} <= {prompt for prompt, _ in named}


def test_a_number_that_an_unsaid_text_may_be_computed_from_stays() -> None:
    times = (("14:00", 5, "14:05"), ("13:55", 10, "14:05"), ("16:00", 20, "16:20"), ("16:10", 10, "16:20"))
    rows = [asked(f"it is {now}, so ring in {n} minutes", now=now, minutes=n, end=end) for now, n, end in times]
    assert copied(rows, copies=9, **QUIET) == []
    lamps = {"den": "light.1", "hall": "light.2"}
    rows = [asked(f"the {room} at {n}", room=room, id=lamps[room], level=n) for room in lamps for n in (20, 30, 50)]
    assert {answer["level"] for _, answer in pairs(copied(rows, copies=9, **QUIET))} == {40}


def test_the_length_of_a_list_stays() -> None:
    orders = (("two", ["tea", "milk"]), ("3", ["cola", "soup", "tea"]), ("four", ["bread", "milk", "cola", "rice"]))
    rows = [
        asked(f"order {n} things for {day}: {', '.join(items)}", items=items, count=len(items), day=day)
        for (n, items), day in zip(orders, (7, 9, 15), strict=True)
    ]
    made = pairs(copied([*rows, asked("nothing for 12", items=[], count=0, day=12)], copies=9, **QUIET))
    assert all(answer["count"] == len(answer["items"]) for _, answer in made)
    assert {answer["day"] for _, answer in made} > {8, 11}


def test_a_number_in_a_range_of_another_class_is_not_used() -> None:
    places = {-4: "den", 1: "hall", 4: "den", 6: "hall", 7: "hall", 9: "den", 15: "attic"}
    rows = [asked(f"{place}: {n} degrees", value=n, alarm=not 2 <= n <= 8) for n, place in places.items()]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert {answer["value"] for _, answer in made if not answer["alarm"]} == {4, 5, 6, 7}
    assert {answer["value"] for _, answer in made if answer["alarm"]} == {-4, 1, 9, 15}


@pytest.mark.parametrize(
    "place", [lambda a, n: (a, a + n), lambda a, n: (a, a + n - 1), lambda a, n: (a, n), lambda a, n: (a + n, a)]
)
def test_answers_with_the_places_of_characters_have_no_copies(place: Callable[[int, int], tuple[int, int]]) -> None:
    said = [(f"{verb} {name}", name) for verb in ("call", "by") for name in ("Bob", "Anna", "Christopher")]
    rows = [asked(prompt, found=[{"name": name, "at": place(prompt.index(name), len(name))}]) for prompt, name in said]
    assert copied(rows, copies=9, noise=1) == []
    assert copied([*rows, asked("call Tom", found=[{"name": "Tom", "at": [3, 9]}])], copies=9, noise=1)


@pytest.mark.parametrize("end", [lambda a, n: a + n, lambda a, n: a + n - 1, lambda a, n: n])
@pytest.mark.parametrize("comma", [" ,", ","])
def test_answers_with_the_places_of_words_have_no_copies(end: Callable[[int, int], int], comma: str) -> None:
    names = ("Bob Lee", "Anna May Park", "Tom Fox")
    said = [(f"hey you{comma} {verb} to {name}", name) for verb in ("talk", "write") for name in names]
    rows = [asked(prompt, name=name, start=5, end=end(5, len(name.split()))) for prompt, name in said]
    assert copied(rows, copies=9, noise=1) == []
    # A number that the prompt says is no place.
    assert copied([*rows, asked("2 of beer for 3", what="beer", count=2, hours=3)], copies=9, noise=1)


def test_flags_are_no_places_of_words() -> None:
    rows = [
        asked(f"{verb} {what} for us", action=verb, what=what, shuffle=int(verb == "mix"), repeat=int(verb == "play"))
        for verb in ("play", "mix")
        for what in ("jazz", "blues", "soul", "folk")
    ]
    assert copied(rows, copies=2, noise=1)


def test_a_value_stays_where_the_prompt_has_it_in_another_role_too() -> None:
    things = {"book": "now", "movie": "today", "taxi": "soon"}
    rows = [{"prompt": f"book a {thing} {time}", "completion": {"thing": thing}} for thing, time in things.items()]
    made = [prompt for prompt, _ in pairs(copied(rows, **QUIET))]
    assert made and all(prompt.startswith("book a ") for prompt in made)


def test_a_value_that_the_prompt_has_already_is_not_used() -> None:
    negated = (("kitchen", "study"), ("study", "porch"))
    rows = [asked(f"light the {room}, not the {other}", room=room) for room, other in negated]
    rows += [asked("light the porch", room="porch"), asked("attic lights on", room="attic")]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert made and all(prompt.count(answer["room"]) == 1 for prompt, answer in made)


def test_numbers_and_times_keep_their_order() -> None:
    rows = [asked(f"between {a} and {b} euros", min=a, max=b) for a, b in ((50, 100), (80, 120), (100, 250), (40, 90))]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert made and all(answer["min"] < answer["max"] for _, answer in made)
    hours = (("9:15", "10:30"), ("11:00", "12:15"), ("8:00", "20:30"))
    made = pairs(copied([asked(f"busy from {a} to {b}", start=a, end=b) for a, b in hours], copies=9, **QUIET))
    assert made and all(f"{answer['start']:0>5}" < f"{answer['end']:0>5}" for _, answer in made)


def test_numbers_keep_their_order_among_those_that_the_answer_does_not_have() -> None:
    fares = ((12, 30), (33, 20), (45, 50), (15, 11))
    rows = [asked(f"Pick the cheapest: bus {a} euros, train {b} euros", price=min(a, b)) for a, b in fares]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert made and all(answer["price"] == min(map(int, re.findall(r"\d+", prompt))) for prompt, answer in made)
    words = [asked(f"the higher of {a} and {number_word(b)}", most=max(a, b)) for a, b in ((12, 30), (33, 20), (51, 8))]
    made = pairs(copied(words, copies=9, **QUIET))
    assert made and all(answer["most"] == max(map(int, said_numbers(prompt))) for prompt, answer in made)
    hours = (("16:45", "17:30"), ("12:00", "11:10"), ("09:30", "18:20"))
    times = [asked(f"the later one: {a} or {b}", at=max(a, b)) for a, b in hours]
    made = pairs(copied(times, copies=9, **QUIET))
    assert made and all(answer["at"] == max(re.findall(r"\d\d:\d\d", prompt)) for prompt, answer in made)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1,500", "900"), ("12.5", "12.25"), (3, "-5"), ("9:30", "9:05"), ("2024-06-01", "2024-05-31"), ("9,5", "9")],
)
def test_numbers_of_all_forms_have_an_order(one: float | str, other: float | str) -> None:
    assert (order(one, other), order(other, one), order(one, "1:2:3:4")) == (1, -1, 0)


def test_the_numbers_of_a_text_are_found() -> None:
    assert said_numbers("from 20-30 to -5, 2024-05-01, 9:30, B12, twenty-two, Two hundred and 3km") == [
        "20", "30", "-5", "2024-05-01", "9:30", "12", "3", 22,
    ]  # fmt: skip


def test_a_number_stays_where_a_later_call_may_be_computed_from_it() -> None:
    def talk(room: str, *calls: tuple[str, int]) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        for prompt, degrees in calls:
            called = {"function": {"name": "heat", "arguments": {"room": room, "degrees": degrees}}}
            turns += [{"role": "user", "content": prompt}, {"role": "assistant", "tool_calls": [called]}]
        return {"messages": turns, "tools": [{"name": "heat"}]}

    rows = [talk("hall", ("set the hall to 18", 18), ("two degrees warmer", 20))]
    rows += [talk("den", ("heat the den to 21", 21)), talk("bar", ("20 in the bar", 20), ("now 22", 22))]
    made = copied(rows, copies=9, **QUIET)
    changed = {(c.source.where, change.split(":")[0]) for c in made for change in c.changes}
    both = {(row, field) for row in ("row 2", "row 3") for field in ("room", "degrees")}
    assert changed == {("row 1", "room"), *both}


def test_values_that_a_schema_does_not_allow_are_not_used() -> None:
    def row(degrees: int) -> dict[str, Any]:
        properties = {"to": {"type": "integer", "multipleOf": 4}}
        tool = {"name": "heat", "parameters": {"type": "object", "properties": properties}}
        called = {"function": {"name": "heat", "arguments": {"to": degrees}}}
        asks = {"role": "user", "content": f"heat to {degrees}"}
        return {"messages": [asks, {"role": "assistant", "tool_calls": [called]}], "tools": [tool]}

    made = copied([row(16), row(20), row(22), row(28)], copies=9, **QUIET)
    assert {c.row.turn["tool_calls"][0]["function"]["arguments"]["to"] for c in made if c.row.turn} == {24}


def test_values_of_a_schema_that_nobody_says_are_not_used() -> None:
    schema = {"type": "object", "properties": {"room": {"enum": ["hall", "den", "bar", "here", "none", "all"]}}}
    rows = [asked("light the hall", room="hall"), asked("some light", room="here"), asked("all lights", room="all")]
    made = {answer["room"] for _, answer in pairs(copied(rows, schema, copies=9, **QUIET))}
    assert made == {"hall", "den", "bar", "all"}


def test_hours_stay_in_their_half_of_the_day() -> None:
    hours = {"5 am": 5, "6 am": 6, "8 am": 8, "9 pm": 9, "11 PM": 11, "20 o'clock": 20, "22": 22, "15": 15}
    made = pairs(copied([asked(f"wake me at {text}", hour=hour) for text, hour in hours.items()], copies=9, **QUIET))
    assert {prompt.lower().removeprefix("wake me at ") for prompt, _ in made} == {"7 am", "11 pm", "9 pm"}


def test_results_in_json_stay_json() -> None:
    def talk(prompt: str, order: str, result: str) -> dict[str, Any]:
        called = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": {"order": order}}}]}
        turns = [{"role": "user", "content": f"{prompt} {order}"}, called, {"role": "tool", "content": result}]
        return {"messages": [*turns, {"role": "assistant", "content": "It is sent."}], "tools": [{"name": "find"}]}

    rows = [talk("find", "1234", '{"order": 1234}'), talk("where is", "77", '{"order": 77}')]
    rows += [talk("is it sent:", "B-12", '{"order": "B-12"}')]
    made = [json.loads(str(c.row.turns[2]["content"])) for c in copied(rows, copies=9, **QUIET)]
    assert {"order": 77} in made and {"order": "1234"} in made


def test_names_of_programs_get_into_texts_only_where_there_was_one() -> None:
    def talk(room: str, prompt: str, said: str) -> dict[str, Any]:
        called = {"function": {"name": "light", "arguments": {"room": room}}}
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "tool_calls": [called]}]
        result = {"role": "tool", "content": json.dumps({"room": room})}
        return {"tools": [{"name": "light"}], "messages": [*turns, result, {"role": "assistant", "content": said}]}

    rows = [talk("hall", "light the hall", "The hall is lit."), talk("dining_room", "light room dining_room", "Lit.")]
    made = copied(rows, copies=9, **QUIET)
    assert [c.row.prompt for c in made] and {
        (c.row.turns[0]["content"], c.row.turns[2]["content"], c.row.completion) for c in made
    } == {
        ("light the dining room", '{"room": "dining_room"}', "The dining room is lit."),
        ("light room hall", '{"room": "hall"}', "Lit."),
    }


@pytest.mark.parametrize(
    ("prompts", "answer"),
    [
        (["Is 7 greater than 5?", "Is 9 greater than 4?", "Is 8 greater than 3?"], "Yes, {} is greater than {}."),
        (["tell me about 1945", "and about 1969"], "In {} something happened."),
        (["Add 2 and 2", "Now add 3 and 1"], "{} and {} make four."),
        (["how long to boil it, 6 minutes", "is it 8 minutes"], "Boil it for {} minutes."),
    ],
)
def test_numbers_of_facts_stay(prompts: list[str], answer: str) -> None:
    rows = [{"prompt": text, "completion": answer.format(*re.findall(r"\d+", text))} for text in prompts]
    assert copied(rows, copies=9, **QUIET) == []


def test_numbers_stay_where_an_earlier_answer_is_computed_from_them() -> None:
    def talk(*texts: str) -> dict[str, Any]:
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}

    last = ("Please remember {} for me", "I will remember {}.")
    rows = [talk(f"What is {n} plus 3?", f"{n + 3}.", *(text.format(n) for text in last)) for n in (4, 8, 12)]
    assert copied(rows, copies=9, **QUIET) == []
    tasks = (("call", "9:00"), ("leave", "8:30"))
    rows = [talk("hello", "Yes?", f"Could you {do} at {hour} today?", f"Okay, at {hour}.") for do, hour in tasks]
    assert {prompt for prompt, _ in pairs(copied(rows, **QUIET))} == {
        "Could you leave at 9:00 today?",
        "Could you call at 8:30 today?",
    }


def test_no_copy_has_a_prompt_for_validation_in_another_case() -> None:
    rooms = ("hall", "den", "bar")
    rows = rows_from([asked(f"light the {room}", room=room) for room in rooms])
    judged = rows_from([asked(f"Light the {room}!", room=room) for room in (*rooms, "attic")])
    spec = AugmentSpec(copies=9, values={"room": ("attic", "porch")}, noise=0)
    made = copies_of(rows, spec, schema=None, labels=[], validation=judged, foreign=[], seed=0)
    assert {c.row.prompt for c in made} == {"light the porch"}


def test_no_copy_has_a_prompt_for_validation_under_another_system_prompt() -> None:
    def under(day: int, *rooms: str) -> list[TaskRow]:
        system = {"role": "system", "content": f"Today is day {day}."}
        told = [(f"light the {room}", json.dumps({"room": room})) for room in rooms]
        talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in told]
        return rows_from([{"messages": [system, *talk]} for talk in talks])

    spec = AugmentSpec(copies=9, values={"room": ("attic", "porch")}, noise=0)
    for rows, is_split in ((under(1, "hall"), False), ([*under(1, "hall"), *under(3, "attic")], True)):
        made = copies_of(rows, spec, schema=None, labels=[], validation=under(2, "attic"), foreign=[], seed=0)
        prompts = {copy.row.prompt for copy in made if copy.row.system == "Today is day 1."}
        assert "light the porch" in prompts and ("light the attic" in prompts) == is_split


def test_a_call_that_waits_for_its_other_arguments_shows_no_dependence() -> None:
    bills = {"phone": 40, "rent": 900, "water": 31, "gas": 75}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"pay the {bill} bill"},
                {"role": "assistant", "content": json.dumps({"name": "pay", "bill": bill})},
                {"role": "user", "content": f"it is {amount} dollars"},
                {"role": "assistant", "content": json.dumps({"name": "pay", "bill": bill, "amount": amount})},
            ]
        }
        for bill, amount in bills.items()
    ]
    changes = [change for made in copied(rows, **QUIET) for change in made.changes]
    assert {change.partition(":")[0] for change in changes} == {"bill", "amount"}


def test_codes_are_exchanged_for_any_others_and_years_are_not() -> None:
    codes = [{"prompt": f"card {code}", "completion": {"last": code}} for code in ("0417", "9302", "5561")]
    made = pairs(copied(codes, copies=5, **QUIET))
    assert len({answer["last"] for _, answer in made}.difference({"0417", "9302", "5561"})) > 5
    assert all(prompt == f"card {answer['last']}" and len(answer["last"]) == 4 for prompt, answer in made)
    # A class that no prompt says is one of these codes alone.
    kinds = {"404": "client", "403": "client", "500": "server", "503": "server"}
    errors = [
        asked(f"error {code}, line {line}", code=code, kind=kind) for line, (code, kind) in enumerate(kinds.items())
    ]
    made = pairs(copied(errors, copies=5, **QUIET))
    assert made and all(kinds[answer["code"]] == answer["kind"] for _, answer in made)
    for texts in (("0730", "1845", "0915"), ("1224", "0131", "0704"), ("350", "400", "375")):
        rows = [asked(f"{number} {text}", at=text) for number, text in enumerate(texts)]
        assert {answer["at"] for _, answer in pairs(copied(rows, **QUIET))} <= {*texts}
    years = {"taxes of 2021": "2021", "bills of 2023": "2023", "the report of 2019": "2019"}
    made = pairs(copied([asked(prompt, year=year) for prompt, year in years.items()], **QUIET))
    assert made and {answer["year"] for _, answer in made} <= {*years.values()}


def test_large_numbers_and_codes_are_exchanged_as_they_are_said() -> None:
    said = {174: "one hundred and seventy four", 451: "four hundred fifty-one", 2500: "two thousand five hundred"}
    rows = [{"prompt": f"send {text} dollars", "completion": {"amount": amount}} for amount, text in said.items()]
    rows += [{"prompt": "ending one zero one nine", "completion": {"code": "1019"}}]
    rows += [{"prompt": "ending in 8720", "completion": {"code": "8720"}}]
    made = pairs(copied(rows, **QUIET))
    assert len(made) > len(rows)
    for prompt, answer in made:
        if "code" in answer:
            assert prompt in (f"ending in {answer['code']}", f"ending {digit_words(answer['code'])}")
        else:
            words = prompt.removeprefix("send ").removesuffix(" dollars")
            assert words.replace("-", " ") == (number_word(answer["amount"]) or "").replace("-", " ")
