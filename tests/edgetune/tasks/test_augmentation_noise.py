from __future__ import annotations

import pytest

from edgetune.tasks.augmentation.english import is_english


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["play some jazz", "kitchen lights off", "volume up", "timer ten minutes", "call mom", "stop"], True),
        (["turn on the lamp", "set the Wohnzimmer to 20 percent"], True),
        (["Licht in der Küche an", "Stell im Flur 75 Prozent ein", "Bad auf fünfzig Prozent"], False),
        (["pon la luz de la cocina", "apaga todo", "play Despacito"], False),
        (["allume la lampe du salon", "mets la musique", "un minuteur de dix minutes"], False),
        (["accendi la luce in cucina", "spegni tutto"], False),
        (["zet de lamp in de keuken aan", "is het warm", "doe alles uit"], False),
        (["रसोई की बत्ती जलाओ", "play रेडियो"], False),
    ],
)
def test_english_is_told_from_other_languages(prompts: list[str], expected: bool) -> None:
    assert is_english(prompts) is expected
