from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from made_copies import copied, pairs

from edgetune.tasks.augmentation.english import is_english
from edgetune.tasks.augmentation.noise import noisy
from edgetune.tasks.augmentation.slots import Mention

REVIEWS = [
    "Great blender, crushes ice without leaking.",
    "Broke after two weeks.",
    "They sent me one which had been used before.",
    "Battery life could be better, but sound quality should please anyone.",
    "Very comfortable shoes, true size.",
    "Customer service would never answer.",
    "These headphones were cheap, then fell apart.",
    "Just perfect!",
    "Heavier than expected, because of its metal case.",
    "Zipper came out, refund took months.",
]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["play some jazz", "kitchen lights off", "volume up", "timer ten minutes", "call mom", "stop"], True),
        (REVIEWS, True),
        (["turn on the lamp", "set the Wohnzimmer to 20 percent"], True),
        (["Licht in der Küche an", "Stell im Flur 75 Prozent ein", "Bad auf fünfzig Prozent"], False),
        (["Licht an", "Licht aus", "Heizung an"], False),
        (["set an alarm for ten", "is there an umbrella in the hall"], True),
        (["pon la luz de la cocina", "apaga todo", "play Despacito"], False),
        (["allume la lampe du salon", "mets la musique", "un minuteur de dix minutes"], False),
        (["accendi la luce in cucina", "spegni tutto"], False),
        (["zet de lamp in de keuken aan", "is het warm", "doe alles uit"], False),
        (["रसोई की बत्ती जलाओ", "play रेडियो"], False),
        (["kitchen ki light on karo", "TV off kar do", "music play karo"], False),
        (["kapcsold fel a lámpát a konyhában", "kapcsold le a fűtést"], False),
        (["acende a luz da sala", "abre a porta", "me lembra de ligar a TV"], False),
        (["aprinde lumina in living", "da drumul la muzica in baie"], False),
        (["sluk lyset i stuen", "spil musik i stuen", "ring til min mor"], False),
    ],
)
def test_english_is_told_from_other_languages(prompts: list[str], expected: bool) -> None:
    assert is_english(prompts) is expected


def made(prompt: str, kept: Sequence[Mention] = (), *, english: bool = True) -> dict[str, str]:
    """The noisy prompts of some seeds, and their kinds."""
    return dict(noisy(prompt, kept, random.Random(seed), english=english) for seed in range(90))


def test_noise_changes_every_prompt_that_it_can_change() -> None:
    assert "turn the lamp on now" not in made("turn the lamp on now")
    assert made("on", [Mention(0, 2)]) == {"on": "mistyped"}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("20%", "twenty percent"), ("5 %", "five percent"), ("7:30", "seven thirty"), ("18:05", "eighteen oh five"),
        ("150", "one hundred fifty"), ("300", "three hundred"), ("21.5", "twenty one point five"),
        ("0.05", "zero point zero five"),
    ],
)  # fmt: skip
def test_numbers_are_spoken_in_words(written: str, said: str) -> None:
    prompt = f"Set it {written}"
    spoken = {text for text, kind in made(prompt).items() if kind == "spoken"}
    assert spoken and all(text.endswith(said) for text in spoken)
    assert all(written in text for text in [*made(prompt, english=False), *made(prompt, [Mention(7, len(prompt))])])


@pytest.mark.parametrize("number", ["007", "07:30", "8812", "1.2.3", "7:00", "2024-05-01", "1,5"])
def test_ids_and_dates_are_not_spoken_in_words(number: str) -> None:
    assert all(number in text for text in made(f"Find order {number}"))


@pytest.mark.parametrize(
    ("form", "rooms"),
    [("把{}的灯打开, please", ("厨房", "卧室")), ("{}nlicht bitte an", ("Küche", "Treppe"))],
)
def test_noise_keeps_values_that_are_parts_of_words(form: str, rooms: tuple[str, ...]) -> None:
    rows = [{"prompt": form.format(room), "completion": {"room": room}} for room in rooms]
    copies = pairs(copied(rows, copies=30, noise=1))
    assert copies and all(answer["room"].lower() in prompt.lower() for prompt, answer in copies)


def test_another_case_keeps_lines_and_spaces() -> None:
    made_texts = made("lamps:\n  - Hall\n  - Den").items()
    texts = {text for text, kind in made_texts if kind == "other case"}
    assert texts == {"lamps:\n  - hall\n  - den", "LAMPS:\n  - HALL\n  - DEN"}


def test_long_prompts_take_time_by_their_length() -> None:
    words = [f"W{number}" for number in range(4000)]
    places = [6 * number for number in range(4000)]
    prompt = "".join(f"{word:6}" for word in words)
    started = time.process_time()
    kept = [Mention(place, place + len(word)) for place, word in zip(places, words, strict=True)]
    assert noisy(prompt, kept, random.Random(0), english=True)[0].split() == words
    assert time.process_time() - started < 1, "0.03 s, and seconds if each word is compared with all that stay"


def test_words_of_letters_without_case_get_no_typo() -> None:
    assert set(made("把客厅的灯打开", english=False)) == {"把客厅的灯打开"}
    texts = set(made("把客厅的灯打开 please", english=False))
    assert len(texts) > 1 and all(text.startswith("把客厅的灯打开 ") for text in texts)


def test_articles_are_lost_or_repeated_and_compounds_split() -> None:
    texts = set(made("Go to the bedroom"))
    assert any("the the" in text for text in texts) and any("bed room" in text for text in texts)


def test_numbers_stay_numbers_and_other_words_become_none() -> None:
    assert all("four" in text.lower() or "4" in text for text in made("Order four"))
    assert all("one" in text.lower() for text in made("Add one"))
    assert not any(word in text for text in made("Go to it for now") for word in ("two", "2", "four", "4"))
