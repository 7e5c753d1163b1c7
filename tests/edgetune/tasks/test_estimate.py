from __future__ import annotations

import pytest
from edgetune_runtime.tools.definitions import tool_set

from edgetune.tasks.data import TaskRow
from edgetune.tasks.estimate import beginning_tokens, estimated_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("台所の電気をつけてください。いま帰りましたので、部屋が暗くて何も見えません。お願いいたします。", 82),
        ("Пожалуйста, включи свет на кухне, я только что вернулся, и здесь слишком темно.", 61),
        ("กรุณาเปิดไฟในครัว ฉันเพิ่งกลับมาและห้องมืดเกินไป", 91),
        ("부엌 불을 켜 주세요. 방금 집에 돌아왔는데 방이 너무 어두워서 아무것도 보이지 않아요.", 102),
        ("እባክህ የወጥ ቤቱን መብራት አብራ። አሁን ወደ ቤት ተመልሻለሁ እና ክፍሉ በጣም ጨለማ ነው።", 135),
        ("please turn on the light in the kitchen, I just came home and the room is far too dark", 20),
        ("-12.34 7.05 98.61 03-1000-2000 2026-01-01T10:20:30 1395", 55),
        ('{"a": [{"b": null, "c": -1.5}, {"b": "", "c": 0}, {"d": {"e": [true, false]}}]}', 40),
    ],
)
def test_an_estimate_is_not_below_the_tokens_of_smollm2(text: str, tokens: int) -> None:
    assert tokens <= estimated_tokens(TaskRow("", text=text), None) <= 1.5 * tokens


def test_tools_count_with_what_is_written_around_them_and_the_system_prompt_once() -> None:
    tools = tool_set([{"name": "dim", "description": "Dims the lamp.", "parameters": {"type": "object"}}])
    row = TaskRow("", ({"role": "user", "content": "dim"},), "ok", tools=tools)
    assert tools is not None
    assert beginning_tokens(row, None) > 60 + len(tools.text) / 3
    own = TaskRow("", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "dim"}), "ok")
    without = TaskRow("", own.messages[1:] if own.messages else None, "ok")
    assert estimated_tokens(own, "Another one.") == estimated_tokens(without, "Be brief.")
