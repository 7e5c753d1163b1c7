from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.tools.definitions import tool_set
from recipes import thermometers

from edgetune.recipe.rows import Rows
from edgetune.tasks.data import TaskRow, read_rows
from edgetune.tasks.metrics import answers_to_score, asked, checked_answers, is_scorable, labels_in, metric_for, score
from edgetune.tasks.plain_prompts import answered_prompts


def rows(*completions: str) -> list[TaskRow]:
    return [TaskRow(f"x:{n}", ({"role": "user", "content": "q"},), text) for n, text in enumerate(completions)]


def test_auto_finds_the_metric_that_fits_the_rows() -> None:
    assert metric_for("auto", rows("on", "off"), ["on", "off"]) == "label"
    assert metric_for("auto", rows('{"a": 1}', '{"b": 2}'), None) == "json"
    assert metric_for("auto", rows('[{"name": "set the lamp", "room": "hall"}]', "[]", '{"a": 1}'), None) == "json"
    assert metric_for("auto", rows('{"a": 1}', "1"), None) == "exact"
    assert metric_for("auto", rows("yes it is", "no"), None) == "exact"
    assert metric_for("auto", rows("yes it is so", "no it is not so"), None) == "rouge_l"
    assert metric_for("auto", [TaskRow("x:1", text="once upon a time")], None) == "perplexity"
    assert metric_for("auto", rows("打开灯", "关"), None) == "exact"
    assert metric_for("auto", rows("今天天气很好我们去公园散步", "客厅的灯已经打开了。"), None) == "rouge_l"
    assert metric_for("auto", rows("ไฟ เปิด", "สวัสดี"), None) == "rouge_l"


def test_rows_with_labels_that_occur_again_are_scored_as_such() -> None:
    labelled = [replace(row, is_labelled=True) for row in rows("on", "off", "on", "a label of many words")]
    assert metric_for("auto", labelled, None) == "label"
    assert labels_in(labelled) == ("a label of many words", "off", "on")
    assert metric_for("auto", labelled[:2], None) == "exact"
    assert metric_for("auto", [*labelled, *rows("on")], None) == "exact"
    assert metric_for("exact", labelled, None) == "exact"


def test_a_metric_that_is_named_is_kept() -> None:
    assert metric_for("chrf", rows("on"), ["on"]) == "chrf"


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        ('{"a": 1, "b": [true]}', '{"b": [true], "a": 1.0}', 1.0),
        ('{"a": 1}', '{"a": true}', 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ('{"a": 1', '{"a": 1}', 0.0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 0.0),
        ("[" * 100_000, "[]", 0.0),
        ('["cafe\u0301"]', '["caf\u00e9"]', 1.0),
        ('{"cafe\u0301": 1}', '{"caf\u00e9": 1}', 1.0),
    ],
)
def test_json_compares_values(prediction: str, reference: str, equal: float) -> None:
    assert score("json", [prediction], [reference]) == (equal, [equal])


def test_exact_and_label_ignore_surrounding_space() -> None:
    for metric in ("exact", "label"):
        assert score(metric, [" on\n", "of"], ["on", "off"]) == (0.5, [1.0, 0.0])


def test_exact_ignores_the_form_of_unicode() -> None:
    assert score("exact", ["cafe\u0301", "cafe"], ["caf\u00e9", "caf\u00e9"])[1] == [1.0, 0.0]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # 3 common words in order of 4 and of 5: 2 * 3 / (4 + 5).
    mean, each = score("rouge_l", ["the lamp is on"], ["The lamp in hall is."])
    assert mean == each[0] == pytest.approx(6 / 9)


def test_rouge_l_counts_words_of_other_scripts() -> None:
    assert score("rouge_l", ["свет включён"], ["свет включён"])[0] == 1.0
    assert score("rouge_l", ["свет выключен"], ["свет включён"])[0] == 0.5
    assert score("rouge_l", ["👍", "…"], [" 👍", "!"])[1] == [1.0, 0.0]


def test_rouge_l_counts_the_characters_of_scripts_without_spaces() -> None:
    park = score("rouge_l", ["今天天气很好我们去公园散步"], ["今天天气很好我们去公园玩"])[0]
    assert park == pytest.approx(2 * 11 / (13 + 12))
    # 7 and 6 letters, of which those with other vowel or tone marks are others.
    assert score("rouge_l", ["สวัสดีครับ"], ["สวัสดีค่ะ"])[0] == pytest.approx(2 * 4 / (7 + 6))
    assert score("rouge_l", ["iPhoneを買った"], ["iPadを買った"])[0] == pytest.approx(2 * 4 / (5 + 5))


def test_rouge_l_keeps_words_with_combining_marks_whole() -> None:
    assert score("rouge_l", ["नमस्ते दुनिया"], ["नमस्कार दोस्त"])[0] == 0.0
    assert score("rouge_l", ["नमस्ते दुनिया"], ["नमस्ते दोस्त"])[0] == 0.5
    assert score("rouge_l", ["cafe\u0301"], ["café"])[0] == 1.0


def test_rouge_l_compares_words_of_spaced_scripts_as_it_did() -> None:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - slow to import

    class LettersAndDigits:
        def tokenize(self, text: str) -> list[str]:
            return re.findall(r"\w+", text.lower())

    texts = [
        "It's 21.5 °C in the kitchen_2 - turn on e-mail alerts!",
        "It is 21 °C in the hall - turn off e-mail alerts.",
        "Öffne das Fenster im Flur; ça va, señor?",
        "Öffne die Tür im Flur, ça va?",
        "Άνοιξε το φως στην κουζίνα",
        "Άνοιξε το φως στο σαλόνι",
        "Включи свет на кухне, пожалуйста: ещё ярче",
        "Выключи свет на кухне",
        "شغل الضوء في المطبخ؟ می‌خواهم",
        "أطفئ الضوء في المطبخ",
    ]
    pairs = list(itertools.product(texts, texts))
    scorer = RougeScorer(["rougeL"], tokenizer=LettersAndDigits())
    before = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    assert score("rouge_l", *zip(*pairs, strict=True))[1] == before


def test_chrf_lies_between_0_and_1() -> None:
    mean, each = score("chrf", ["the lamp is on", "xyz", "", ""], ["the lamp is on", "the lamp", "", "on"])
    assert each == [1.0, 0.0, 1.0, 0.0]
    assert mean == 0.5


@pytest.mark.parametrize("metric", ["perplexity", "auto", "bleu"])
def test_metrics_that_compare_no_answers_are_refused(metric: str) -> None:
    with pytest.raises(UsageError, match=f"'{metric}' does not compare"):
        score(metric, ["a"], ["a"])


def test_a_reference_that_is_not_json_is_an_error_not_a_zero() -> None:
    with pytest.raises(UsageError, match="the reference 'on' is not JSON"):
        score("json", ["{}"], ["on"])


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_nothing_to_score_is_an_error(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(UsageError, match="cannot score"):
        score("exact", predictions, references)


def test_calls_are_compared_by_names_and_arguments_and_texts_beside_tools_by_calling_none() -> None:
    call = '{"tool_calls": [{"name": "lamp", "arguments": {"a": 1, "b": 2}}]}'
    swapped = '{"content": "Sure.", "tool_calls": [{"name": "lamp", "arguments": {"b": 2, "a": 1}}]}'
    for metric in ("exact", "json"):
        assert score(metric, [swapped, call, "no"], [call, swapped, call])[1] == [1, 1, 0]
    answers, references = ["nothing", call, call, "nothing"], ["there is nothing to do", "no", call, call]
    assert score("json", answers, references, offers_tools=[True] * 4)[1] == [1, 0, 1, 0]
    with pytest.raises(UsageError, match="is not JSON"):
        score("json", answers, references, offers_tools=[False] * 4)


def test_rows_with_tools_that_mostly_end_in_calls_are_compared_as_json() -> None:
    tools = tool_set([{"name": "lamp"}])
    call = TaskRow("x", completion='{"tool_calls": [{"name": "lamp", "arguments": {}}]}', tools=tools)
    text = replace(call, completion="there is nothing at all to do here")
    assert metric_for("auto", [call, call, text], None) == "json"
    assert metric_for("auto", [call, text, text], None) == "rouge_l"
    assert metric_for("auto", [call, call, replace(text, tools=None)], None) == "rouge_l"


def test_a_wrong_call_has_no_words_in_common_with_the_right_one() -> None:
    right, wrong = (
        json.dumps({"tool_calls": [{"name": "on", "arguments": {"room": room}}]}) for room in ("den", "hall")
    )
    for metric in ("rouge_l", "chrf", "exact", "json"):
        assert score(metric, [right, wrong, "on den"], [right, right, right])[1] == [1, 0, 0]
    assert score("rouge_l", [wrong], ["It is on in the hall."])[0] == 0


def test_a_question_back_is_compared_and_what_is_said_of_a_result_is_not() -> None:
    (talk,) = thermometers(1, 1)
    question = [{"role": "user", "content": "how warm is it?"}, {"role": "assistant", "content": "Where?"}]
    (row,) = read_rows(Rows.of("x", [{**talk, "messages": [*question, *talk["messages"]]}]))
    question_back, called, _ = row.answers
    assert answers_to_score([row], "json") == [question_back, called] and asked(row, "json") == called
    assert answers_to_score([row], "rouge_l") == row.answers and asked(row, "rouge_l") == row
    unlearned = row.with_turns([{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in row.turns])
    assert not answers_to_score([unlearned], "json") and not is_scorable(unlearned, "json")
    with pytest.raises(
        UsageError, match="none of 1 rows, such as x row 1, can be scored by json: any text is right after a"
    ):
        checked_answers([unlearned], "json")


def test_conversations_are_scored_by_each_answer_that_the_metric_compares() -> None:
    call = {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}], "content": ""}
    roles = ("user", "assistant", "user", "assistant", "user")
    contents: list[dict[str, object]] = [{"content": "a"}, call, {"content": "b"}, {"content": "c"}, {"content": "d"}]
    turns = [{"role": role, **content} for role, content in zip(roles, contents, strict=True)]
    row = TaskRow("x:1", tuple(turns), '{"tool_calls": []}')
    called = '{"tool_calls": [{"name": "f", "arguments": {}}]}'
    scored = answers_to_score([row, replace(row, where="x:2", messages=(*turns[:-1], turns[0]))], "exact")
    assert [(each.where, each.completion) for each in scored] == [
        ("x:1, message 2", called),
        ("x:1, message 4", "c"),
        ("x:1", row.completion),
        ("x:2", row.completion),
    ]
    assert [each.completion for each in answers_to_score([row], "json")] == [called, row.completion]
    assert [each.completion for each in answers_to_score([replace(row, completion="e")], "json")] == [called]
    listed = replace(row, messages=(turns[0], {"role": "assistant", "content": "[1]"}, turns[2]))
    assert [each.completion for each in answers_to_score([listed], "json")] == ["[1]", row.completion]
    assert [each.completion for each in answers_to_score([row], "rouge_l")] == [called, "c", row.completion]
    trained = replace(row, where="x:3", messages=tuple(turns[:3]))
    learned = answered_prompts([trained])
    assert [each.completion for each in answers_to_score([row], "exact", learned)] == [row.completion]
    assert answers_to_score([row], "label") == [row]
    assert scored[0].messages == tuple(turns[:1])
    assert scored[0].turn == turns[1]
