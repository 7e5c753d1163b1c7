"""Changed copies of rows in other languages than English, and of words without spaces between."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from made_copies import QUIET, copied, pairs


@pytest.mark.parametrize(
    ("plain", "twice", "names"),
    [
        ("{0}: perdeyi kapat", "{0}: {0}daki perdeyi de kapat", ("mutfak", "banyo", "salon")),
        ("النور في {0}", "النور في {0} و{0} بعده", ("المكتب", "المخزن", "المطبخ")),
        ("{0}: Licht an", "{0}: mach das {0}licht an", ("Bad", "Flur", "Garten")),
        ("погода {0}", "погода {0}, но ветер для {1}ы", ("Москва", "Самара", "Калуга")),
        ("{0} 打开灯", "{0} 把{0}的灯关掉", ("客厅", "卧室", "厨房")),
        ("turn on the light in the {0}", "turn the {0} light on, the {0}lamp too", ("bed", "floor", "desk")),
    ],
)
def test_a_value_stays_where_the_prompt_has_it_in_another_form_too(
    plain: str, twice: str, names: tuple[str, ...]
) -> None:
    prompts = [(form.format(name, name[:-1]), name) for form in (plain, twice) for name in names]
    rows = [{"prompt": prompt, "completion": {"room": name}} for prompt, name in prompts]
    made = copied(rows, values={"room": ["Atrium", "Saal", "Halle"]}, **QUIET)
    assert made and {c.source.where for c in made} <= {"row 1", "row 2", "row 3"}


@pytest.mark.parametrize("form", ["空调 调到 {0} 度 不要超过{0}度.", "ship order {0} today, it is order{0}"])
def test_a_number_stays_where_the_prompt_has_it_in_a_word_too(form: str) -> None:
    rows = [{"prompt": form.format(n), "completion": {"n": n}} for n in (20, 23, 26)]
    assert copied(rows, copies=9, values={"n": [80]}, **QUIET) == []
    texts = [{"prompt": form.format(n) + end, "completion": f"OK {n}"} for n in (1201, 2604) for end in ("", " Danke.")]
    assert copied(texts, copies=9, **QUIET) == []


@pytest.mark.parametrize("form", ["A 店卖 {} 元 B店卖{}元", "shop A asks {} USD and shop B USD{}"])
def test_numbers_keep_their_order_among_those_after_a_letter(form: str) -> None:
    prices = ((25, 90), (30, 75), (15, 40), (70, 99))
    made = pairs(
        copied([{"prompt": form.format(*both), "completion": {"low": both[0]}} for both in prices], copies=9, **QUIET)
    )
    assert made and all(answer["low"] == min(map(int, re.findall(r"\d+", prompt))) for prompt, answer in made)


def test_words_of_other_languages_are_no_english_numbers() -> None:
    said = (("dodaj", "dziesięć", 10), ("zabierz", "8", 8), ("dodaj", "3", 3))
    rows = [{"prompt": f"{do} ten produkt {text} razy", "completion": {"n": n}} for do, text, n in said]
    made = pairs(copied(rows, copies=9, **QUIET))
    assert made and all(f"ten produkt {answer['n']} razy" in prompt for prompt, answer in made)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("هل رسوم {} {} درهما؟", "نعم، رسوم {} {} درهما."),
        ("{}是 {} 元吗\uff1f", "{}是 {} 元"),
        ("Est-ce que {} coûte {} euros", "Oui, {} coûte {} euros."),
    ],
)
def test_questions_of_other_languages_keep_their_numbers(prompt: str, answer: str) -> None:
    sold = (("Alpha", 15), ("Beta", 60), ("Gamma", 99))
    rows = [{"prompt": prompt.format(*each), "completion": answer.format(*each)} for each in sold]
    assert copied(rows, copies=9, **QUIET) == []


def test_numbers_of_other_languages_are_exchanged_in_sentences_with_an_end_and_where_rows_differ_in_them_alone() -> (
    None
):
    prompts = ["Bestell 12 Kisten Bier", "Bestell 15 Kisten Bier", "Bestell 17 Kisten Bier"]
    prompts += ["Bestell 13 Kisten Salz.", "Bestell 14 Kisten Mehl"]
    rows = [{"prompt": text, "completion": text.strip(".").removeprefix("Bestell ")} for text in prompts]
    made = copied(rows, copies=9, **QUIET)
    assert {c.source.where for c in made} == {"row 1", "row 4"}, "the others have no new number, or may be questions"
    assert all(prompt.strip(".") == f"Bestell {answer}" for prompt, answer in pairs(made))


@pytest.mark.parametrize(
    "size", [len, lambda text: len(text.encode()), lambda text: len(text.encode("utf-16-le")) // 2]
)
@pytest.mark.parametrize("before", ["İzmir ve ", "😀 nach ", "für "])
def test_rows_with_places_in_characters_bytes_or_utf_16_get_no_copies(size: Callable[[str], int], before: str) -> None:
    rows = [
        {
            "prompt": f"{before}{town} {n}",
            "completion": {"text": town, "start": size(before), "end": size(before) + size(town)},
        }
        for n, town in enumerate(("Bursa", "Ankara", "Konya"))
    ]
    assert copied(rows, copies=9) == []
