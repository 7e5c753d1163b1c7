from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.text.chat import messages_for, render
from edgetune_runtime.tools.definitions import tool_set
from edgetune_runtime.tools.prompts import prompt_tokens

from edgetune.objectives.example import Example
from edgetune.recipe.data import Columns
from edgetune.tasks import row_files
from edgetune.tasks.data import TaskRow, read_rows, rows_of
from edgetune.tasks.plain_prompts import plain, plain_prompt
from edgetune.tasks.tokenization import tokenize_rows

Write = Callable[..., str]
QUOTING = 'check the quotation marks in this row: "a ""b"" c" is the text a "b" c'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str | bytes, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write_file


@pytest.fixture(scope="session")
def tokenizer(tiny_gguf: Callable[[str], Path]) -> Iterator[GgufTokenizer]:
    opened = GgufTokenizer(tiny_gguf("llama"))
    yield opened
    opened.close()


def row(prompt: str, completion: str = "ok", where: str = "rows.jsonl:1") -> TaskRow:
    return TaskRow(where, ({"role": "user", "content": prompt},), completion)


def problems_of(source: str, columns: Columns | None = None, labels: list[str] | None = None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read_rows(source, columns, labels=labels)
    return str(caught.value).replace(f"{source}:", "").splitlines()


def test_the_form_of_each_row_is_recognized(write: Write) -> None:
    conversation = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    values = [
        {"messages": conversation},
        {"prompt": "turn on", "completion": "done", "note": 1},
        {"text": "is it late", "label": "time"},
        {"text": "once upon a time"},
    ]
    source = write("\n".join(json.dumps(v) for v in values))
    assert read_rows(source) == [
        TaskRow(f"{source}:1", tuple(conversation[:2]), "hello"),
        row("turn on", "done", f"{source}:2"),
        replace(row("is it late", "time", f"{source}:3"), is_labelled=True),
        TaskRow(f"{source}:4", text="once upon a time"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"room": "Küche", "on": True}, '{"room": "Küche", "on": true}'),
        ([1, "b"], '[1, "b"]'),
        (21.5, "21.5"),
        (False, "false"),
        (" kept as it is ", " kept as it is "),
    ],
)
def test_a_completion_that_is_no_text_becomes_json(write: Write, value: object, text: str) -> None:
    (read,) = read_rows(write(json.dumps({"prompt": "p", "completion": value})))
    assert read.completion == text


def test_several_columns_become_one_json_object_in_their_order(write: Write) -> None:
    source = write('{"slots": {"room": "hall"}, "text": "on", "intent": "light"}')
    (read,) = read_rows(source, Columns(prompt="text", completion=("intent", "slots")))
    assert read == row("on", '{"intent": "light", "slots": {"room": "hall"}}', f"{source}:1")


def test_csv_and_tsv_rows_are_read_by_their_header(write: Write) -> None:
    table = 'text,label\r\n"is it\r\nlate, now",time\r\n\r\nstop,"say ""stop"""\r\n'
    source = write("\ufeff" + table, "rows.csv")
    assert read_rows(source) == [
        replace(row("is it\r\nlate, now", "time", f"{source}:2"), is_labelled=True),
        replace(row("stop", 'say "stop"', f"{source}:5"), is_labelled=True),
    ]
    source = write("q\ta\tb\nstop\t1\t2\n", "rows.tsv")
    (read,) = read_rows(source, Columns(prompt="q", completion=("a", "b")))
    assert read.completion == '{"a": "1", "b": "2"}'


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_no_rows(write: Write) -> None:
    source = write('\ufeff{"text": "a\u2028b"}\r\n\r\n  \r\n{"text": "c"}\r\n')
    assert [(r.text, r.where) for r in read_rows(source)] == [("a\u2028b", f"{source}:1"), ("c", f"{source}:4")]


def test_all_bad_rows_are_named_with_line_and_reason(write: Write) -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    lines = [
        '{"text": "a"',
        "[1]",
        '{"promt": "a"}',
        '{"prompt": "a", "completon": "b"}',
        '{"prompt": " ", "completion": "b"}',
        '{"prompt": "a", "completion": ""}',
        '{"prompt": "a", "completion": null}',
        '{"prompt": ["a"], "completion": "b"}',
        '{"text": "\\ud800"}',
        '{"text": NaN}',
        json.dumps({"messages": []}),
        json.dumps({"messages": [user]}),
        json.dumps({"messages": [user, user, assistant]}),
        json.dumps({"messages": [assistant]}),
        json.dumps({"messages": [user, {"role": "robot", "content": "x"}]}),
        json.dumps({"messages": [user, {**assistant, "refusal": "no"}]}),
        json.dumps({"messages": [user, {"role": "assistant"}]}),
        '{"text": "good"}',
    ]
    assert problems_of(write("\n".join(lines))) == [
        "1: not JSON: Expecting ',' delimiter at column 13",
        "2: is a list, not an object; write one object per line",
        "3: has none of messages, prompt and completion, text and label, or text; its keys are promt; "
        "set `columns` to the keys to use",
        "4: has no 'completion'; there is 'completon'",
        "5: prompt is empty",
        "6: completion is empty",
        "7: completion is missing or null",
        "8: prompt is a list, not text",
        "9: text has an unpaired surrogate, which is not valid Unicode",
        "10: not JSON: NaN is not a JSON number",
        "11: messages is empty; give at least one message",
        "12: the last message has role user, expected assistant",
        "13: message 2 has role user, expected assistant",
        "14: message 1 has role assistant, expected user",
        "15: message 2 has role 'robot'; use system, user, assistant or tool",
        "16: message 2 has 'refusal', which is not supported; use only role, content, tool_calls, weight",
        "17: the content of message 2 is missing or null",
    ]


def test_after_twenty_bad_rows_the_rest_is_counted(write: Write) -> None:
    source = write("{}\n" * 23)
    with pytest.raises(UsageError) as caught:
        read_rows(source)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == f"{source}: and 3 more bad rows"


def test_a_completion_that_is_no_label_is_named_with_the_closest_one(write: Write) -> None:
    source = write('{"text": "a", "label": "lihgt"}\n{"text": "b"}\n{"text": "c", "label": "heat"}')
    assert problems_of(source, labels=["light", "heat"]) == [
        "1: 'lihgt' is not one of the labels; did you mean 'light'?",
        "2: is plain text, but the adapter has labels; add a label to the row",
    ]


def test_a_row_has_the_weight_of_its_column(write: Write) -> None:
    rows = ['{"text": "a", "label": "b", "weight": 0.25}', '{"text": "a"}', '{"text": "a", "weight": null}']
    assert [row.weight for row in read_rows(write("\n".join(rows)))] == [0.25, 1.0, 1.0]
    columns = Columns(prompt="text", completion="label", weight="trust")
    assert read_rows(write("text,label,trust\na,b,0.5\n", "rows.csv"), columns)[0].weight == 0.5


def test_a_weight_that_is_none_is_refused(write: Write) -> None:
    rows = [json.dumps({"text": "a", "weight": weight}) for weight in (1.5, -1, "heavy", True, [1])]
    assert problems_of(write("\n".join(rows))) == [
        f"{number}: weight is {shown}; give a number from 0 to 1, or rename the column"
        for number, shown in enumerate(("1.5", "-1", "'heavy'", "True", "[1]"), 1)
    ]


def test_a_column_that_is_not_there_is_named_with_the_closest_one(write: Write) -> None:
    columns = Columns(prompt="sentence", completion="intent")
    assert problems_of(write("sentense,intent\na,b\n", "rows.csv"), columns) == [
        "2: has no 'sentence'; there is 'sentense'"
    ]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("text,label\na\n", "2: has 1 fields, the header has 2"),
        ("text,label\na,b,c\n", "2: has 3 fields, the header has 2"),
        ("text,text\na,b\n", "1: there are two columns 'text'; rename one of them"),
        ("text,label,,\na,b,,\nc,d,,x\n", "3: column 4 has a value but no name; name it in the header, or clear it"),
        ('text,label\na,b\n"c,d\n', f"3: unexpected end of data; {QUOTING}"),
        (
            'text\tlabel\na\tb\n"c\td\ne"\tf\n',
            f"3: a cell in quotation marks has a tab and a line break; {QUOTING}",
        ),
    ],
)
def test_a_broken_table_is_refused_with_its_line(write: Write, table: str, problem: str) -> None:
    assert problems_of(write(table, "rows.tsv" if "\t" in table else "rows.csv")) == [problem]


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("text;label", ["text", "label"]),
        ('"text, raw";label', ["text, raw", "label"]),
        ('"text\nraw";label', ["text\nraw", "label"]),
        ("comment (free, short);label", ["comment (free, short)", "label"]),
        ("comment (free, short, or none);label", ["comment (free, short, or none)", "label"]),
        (";;\ntext;label", ["text", "label"]),
        ("text, label", ["text", "label"]),
        ("text (short; free), label", ["text (short; free)", "label"]),
        ('text, "label;kind"', ["text", "label;kind"]),
        ('"text", "label;kind"', ["text", "label;kind"]),
        ("text,label;kind", ["text", "label;kind"]),
        ("text\tlabel", ["text", "label"]),
        ("text|label", ["text", "label"]),
        ("sep=;\ntext;label", ["text", "label"]),
        ('"sep=|"\r\ntext, raw|label', ["text, raw", "label"]),
    ],
)
def test_a_table_is_split_at_the_sign_that_leaves_the_names_of_its_columns_whole(
    write: Write, header: str, names: list[str]
) -> None:
    delimiter = next((sign for sign in ";\t|" if header.endswith(f"{sign}label")), ",")
    ((where, values),) = row_files.entries(write(f"{header}\nopen it{delimiter}on\n", "rows.csv"))
    assert where.endswith(f":{len(header.splitlines()) + 1}")
    assert values == dict(zip(names, ["open it", "on"], strict=True))


def test_columns_without_name_and_value_are_left_out(write: Write) -> None:
    ((_, values),) = row_files.entries(write("text,label,,\nopen it,on,, \n", "rows.csv"))
    assert values == {"text": "open it", "label": "on"}


def test_one_column_may_have_values_but_no_name(write: Write) -> None:
    ((_, values),) = row_files.entries(write(",text,label\n0,open it,on\n", "rows.csv"))
    assert values == {"": "0", "text": "open it", "label": "on"}


@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_cell_of_a_table_may_be_long(name: str, delimiter: str, write: Write) -> None:
    # Python's default, which another test may have raised.
    csv.field_size_limit(131_072)
    text = "turn on " * 20_000
    (row,) = read_rows(write(f"prompt{delimiter}completion\n{text}{delimiter}on\n", name))
    assert row.prompt == text


def test_text_in_another_encoding_is_refused_with_the_byte(write: Write) -> None:
    assert problems_of(write(b'{"text": "a"}\n{"text": "caf\xe9"}\n')) == [
        "2: not UTF-8 text at byte 27; save the file as UTF-8"
    ]


@pytest.mark.parametrize(("text", "name"), [("", "a.jsonl"), ("\n \n", "a.jsonl"), ("text,label\n", "a.csv")])
def test_a_file_without_rows_is_refused(write: Write, text: str, name: str) -> None:
    with pytest.raises(UsageError, match="has no rows"):
        read_rows(write(text, name))


def test_a_folder_and_an_unknown_kind_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        read_rows(str(tmp_path))
    with pytest.raises(UsageError, match="has an unknown file type"):
        read_rows(write("x", "rows.docx"))


@pytest.mark.parametrize("source", ["data/rows.jsonl", "./data/rows", "/nowhere/rows", "rows", "a/b/c"])
def test_a_missing_file_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(NotFoundError, match=r"no data file .*; check the path"):
        read_rows(source)


def test_a_hub_id_offline_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # noqa: PLC0415 - slow

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        NotFoundError,
        match=r"^cannot load owner/name:config@test from the hub: .*; check the id, the network and your token; .*$",
    ):
        read_rows("owner/name:config@test")


def test_a_data_set_on_this_machine_is_read_with_the_names_of_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder whose name has the form of a hub id is loaded by the same call as one from the hub.
    import datasets  # noqa: PLC0415 - slow

    from edgetune.tasks import row_files  # noqa: PLC0415 - for its private reader

    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': light\n          '1': heat\n---\n"
    )
    (folder / "train.csv").write_text("text,label\non,0\nwarm,1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read = [values for _, values in row_files._hub_rows("owner/name")]
    assert read == [{"text": "on", "label": "light"}, {"text": "warm", "label": "heat"}]


def test_fields_that_a_data_set_adds_with_null_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    names = {"lamp": "room", "heat": "degrees"}
    tools = [{"name": name, "parameters": {"properties": {own: {"type": "string"}}}} for name, own in names.items()]
    rows = [
        {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": name, "arguments": {own: "x"}}}]}], "tools": tools}
        for name, own in names.items()
    ]  # fmt: skip
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read = rows_of("owner/name", row_files._hub_rows("owner/name"))
    assert [row.turn and row.turn["tool_calls"][0]["function"]["arguments"] for row in read] == [
        {"room": "x"},
        {"degrees": "x"},
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "completion": "x", "prompt": "b"}', "the key 'prompt' appears twice; keep one"),
        ('{"prompt": "a", "completion": {"x": [{"y": 1, "y": 2}]}}', "the key 'y' appears twice; keep one"),
        ('{"prompt": "a", "completion": {"x": 1e999}}', "the number 1e999 is too large"),
        ('{"prompt": "a", "completion": {"x": -1e999}}', "the number -1e999 is too large"),
        (json.dumps({"messages": '[{"role": "user", "role": "assistant"}]'}), "the key 'role' appears twice; keep one"),
    ],
)
def test_values_that_json_readers_change_without_a_word_are_refused(write: Write, line: str, problem: str) -> None:
    assert problems_of(write(line)) == [f"1: {problem}"]


def test_conversations_are_read_from_cells_of_json(write: Write) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    cells = [json.dumps(turns), "[1"]
    table = "messages\n" + "".join('"' + cell.replace('"', '""') + '"\n' for cell in cells)
    with pytest.raises(UsageError, match=r"rows\.csv:3: messages is text that is not JSON"):
        read_rows(write(table, "rows.csv"))
    (row,) = read_rows(write(table.rpartition('"[1')[0], "rows.csv"))
    assert row.turns == tuple(turns)


def test_arguments_are_written_in_the_order_of_the_schema(write: Write) -> None:
    tools = [{"name": "lamp", "parameters": {"properties": {"room": {}, "level": {"type": "integer"}}}}]
    call = {"function": {"name": "lamp", "arguments": {"level": 3.0, "room": "hall"}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    (row,) = read_rows(write(json.dumps({"messages": turns, "tools": tools})))
    assert row.completion == '{"tool_calls": [{"name": "lamp", "arguments": {"room": "hall", "level": 3}}]}'


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("¿Qué hora es?", "qué hora es"),
        ("现在几点\uff1f", "现在几点。"),
        ("「電気をつけて」\uff01", "電気をつけて"),
        ("كم الساعة؟", "كم الساعة"),
        ("“Включи” свет —", "включи свет —"),
        ("lamp on,please", "lamp on, please"),
        ("[turn it on] — now…", "turn it on — now"),
        ("मुझे बताओ।", "मुझे बताओ"),
        ("Allume la lampe !", "Allume la lampe!"),
        ("Allume\u202f: la \u00ab\u00a0lampe\u00a0\u00bb\u00a0?!", "allume la lampe"),
        ("是 。", "是"),
        ("is it 5.", "is it 5"),
        ("well...5", "well...5?"),
        ("on ...5", "on 5"),
        ('"lamp 5", please', "lamp 5 please"),
        ("say 'lamp 5'", "say lamp 5"),
        ("(\u2018on 5\u2019)", "on 5"),
        ("is it 5'?", "is it 5'"),
        ("the boys' lamp's on", "the boys lamp's on"),
        ("मुझे बताओ ।", "मुझे बताओ"),
    ],
)
def test_punctuation_of_any_script_makes_no_other_prompt(one: str, other: str) -> None:
    assert plain(one) == plain(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("what\u2019s the time", "What's the time?"),
        ("wi\u2011fi on", "wi-fi on"),
        ("set it to \u22125", "set it to -5"),
        ("hello\u200b there", "hello there"),
        ("I love it \u2764\ufe0f", "I love it \u2764"),
        ("\uff34\uff36\u3092\uff15\uff10\uff05", "TV\u309250%"),
    ],
)
def test_forms_of_a_character_make_no_other_prompt(one: str, other: str) -> None:
    assert plain(one) == plain(other)
    assert plain("10\u00b2") != plain("102")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("to -5 degrees", "to 5 degrees"),
        ("(-5)", "(5)"),
        ("50%", "50"),
        ("C#", "c"),
        ("$5", "5"),
        ("C++", "c"),
        ("?", "!"),
        ("5 + 3", "5 3"),
        ("a - b", "a b"),
        ("set it to .5", "set it to 5"),
        ("-.5", ".5"),
        ("cut 5' off", 'cut 5" off'),
        ("cut 5\u2032 off", "cut 5\u2033 off"),
        ("5'10\", please", "5'10, please"),
        ("I saw it :)", "I saw it :("),
    ],
)
def test_signs_that_change_a_word_make_another_prompt(one: str, other: str) -> None:
    assert plain(one) != plain(other)


def test_a_prompt_of_punctuation_alone_is_another_one_than_other_punctuation(write: Write) -> None:
    rows = read_rows(str(write("".join(f'{{"prompt": "{mark}", "completion": "x"}}\n' for mark in ("?", "...")))))
    assert len({*map(plain_prompt, rows)}) == 2


def test_results_of_other_calls_make_another_prompt(write: Write) -> None:
    calls = [{"id": name, "function": {"name": "heat", "arguments": {"room": name}}} for name in "ab"]
    tools = [{"name": "heat", "parameters": {"properties": {"room": {"type": "string"}}}}]

    def row(first: str, second: str) -> str:
        told = (("a", first), ("b", second))
        results = [{"role": "tool", "tool_call_id": name, "content": text} for name, text in told]
        turns = [{"role": "user", "content": "how warm"}, {"role": "assistant", "tool_calls": calls}, *results]
        if first == "30":
            turns[2:] = reversed(turns[2:])
        return json.dumps({"messages": [*turns, {"role": "assistant", "content": "warm"}], "tools": tools})

    one, other = read_rows(str(write(f"{row('20', '30')}\n{row('30', '20')}")))
    assert [turn["content"] for turn in one.turns] == [turn["content"] for turn in other.turns]
    assert one.prompt_key != other.prompt_key


def test_answers_of_weight_0_are_no_answers_of_the_row(write: Write) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    (row,) = read_rows(str(write(json.dumps({"messages": turns}))))
    assert [answer.completion for answer in row.answers] == ["d"]
    assert [begun.completion for begun in row.beginnings] == ["b", "d"]
    for weight, problem in ((2, "message 4 has weight 2; give 0 or 1"), (0, "the last message has weight 0, so that")):
        turns[-1] = {**turns[-1], "weight": weight}
        with pytest.raises(UsageError, match=problem):
            read_rows(str(write(json.dumps({"messages": turns}))))


def tokenize_one(
    read: TaskRow, tokenizer: GgufTokenizer, system: str | None = None, loss_on: str = "completion"
) -> Example:
    examples, _ = tokenize_rows(
        [read], tokenizer, system=system, loss_on="all" if loss_on == "all" else "completion", max_tokens=600
    )
    return examples[0]


def prompt_of(messages: list[dict[str, str]], tokenizer: GgufTokenizer, system: str | None) -> tuple[int, ...]:
    """The prompt as the runtime makes it."""
    text = render(
        tokenizer.chat_template,
        messages_for(messages, system),
        add_generation_prompt=True,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
    )
    return tuple(tokenizer.tokenize(text))


def text_of(tokens: tuple[int, ...], tokenizer: GgufTokenizer) -> str:
    return b"".join(tokenizer.piece(token) for token in tokens).decode()


def learned_of(example: Example) -> tuple[int, ...]:
    return tuple(token for token, learned in zip(example.tokens, example.learned, strict=True) if learned)


def test_the_prompt_is_the_runtimes_and_only_the_completion_is_learned(tokenizer: GgufTokenizer) -> None:
    example = tokenize_one(row("turn on the light", "light on"), tokenizer, system="Reply in red")
    prompt = prompt_of([{"role": "user", "content": "turn on the light"}], tokenizer, "Reply in red")
    assert example.prompt_tokens == prompt
    assert example.learned == tuple(n >= len(prompt) for n in range(len(example.tokens)))
    assert example.tokens[-1] == tokenizer.end_token
    assert text_of(example.tokens[len(prompt) : -1], tokenizer) == "light on"


def test_a_row_that_brings_its_system_prompt_keeps_it(tokenizer: GgufTokenizer) -> None:
    messages = ({"role": "system", "content": "red"}, {"role": "user", "content": "stop"})
    example = tokenize_one(TaskRow("x:1", messages, "ok"), tokenizer, system="warm")
    assert example.prompt_tokens == prompt_of(list(messages), tokenizer, None)


CONVERSATION = (
    {"role": "user", "content": "what is the time"},
    {"role": "assistant", "content": "time to play"},
    {"role": "user", "content": "stop"},
)


def test_all_turns_of_the_assistant_are_learned(tokenizer: GgufTokenizer) -> None:
    example = tokenize_one(TaskRow("x:1", CONVERSATION, "stop it"), tokenizer)
    assert example.prompt_tokens == prompt_of(list(CONVERSATION), tokenizer, None)
    end = (tokenizer.end_token,)
    first = tuple(tokenizer.tokenize("time to play", continues=True))
    last = tuple(tokenizer.tokenize("stop it", continues=True))
    assert learned_of(example) == first + end + last + end
    before_first = prompt_of(list(CONVERSATION[:1]), tokenizer, None)
    assert example.learned.index(True) == len(before_first)


def test_labels_differ_in_more_than_white_space(write: Write) -> None:
    table = write("text, label\nopen it, on\nopen this,on \nclose it,off\n", "rows.csv")
    assert [row.completion for row in read_rows(table)] == ["on", "on", "off"]
    rows = write('{"text": "open it", "label": " on"}\n')
    assert [row.completion for row in read_rows(rows, labels=["on", "off"])] == ["on"]
    rows = write('{"prompt": "open it", "completion": "on "}\n')
    assert [row.completion for row in read_rows(rows, labels=["on", "off"])] == ["on"]


def test_a_turn_of_weight_0_is_not_learned(tokenizer: GgufTokenizer) -> None:
    first, answer, more = CONVERSATION
    example = tokenize_one(TaskRow("x:1", (first, {**answer, "weight": 0}, more), "stop it"), tokenizer)
    assert example.tokens == tokenize_one(TaskRow("x:1", CONVERSATION, "stop it"), tokenizer).tokens
    assert learned_of(example) == (*tokenizer.tokenize("stop it", continues=True), tokenizer.end_token)
    whole = tokenize_one(TaskRow("x:1", (first, {**answer, "weight": 0}, more), "stop it"), tokenizer, loss_on="all")
    unlearned = tuple(token for token, learned in zip(whole.tokens, whole.learned, strict=True) if not learned)
    told = (*tokenizer.tokenize("time to play", continues=True), tokenizer.end_token)
    assert unlearned == (whole.tokens[0], *told)


def test_a_template_that_rewrites_past_turns_leaves_them_unlearned(
    tiny_gguf: Callable[[str], Path], tokenizer: GgufTokenizer
) -> None:
    rewriting = GgufTokenizer(tiny_gguf("llama"))
    rewriting.chat_template = str(tokenizer.chat_template).replace("m['content']", "m['content'] | upper")
    example = tokenize_one(TaskRow("x:1", CONVERSATION, "stop it"), rewriting)
    rewriting.close()
    assert example.learned.index(True) == len(example.prompt_tokens)


def test_loss_on_all_learns_all_but_the_first_token(tokenizer: GgufTokenizer) -> None:
    example = tokenize_one(row("turn on", "ok"), tokenizer, loss_on="all")
    assert example.learned == (False, *[True] * (len(example.tokens) - 1))
    assert example.prompt_tokens == prompt_of([{"role": "user", "content": "turn on"}], tokenizer, None)


def test_a_text_is_learned_without_template_to_its_end(tokenizer: GgufTokenizer) -> None:
    example = tokenize_one(TaskRow("x:1", text="play the red light"), tokenizer, system="unused")
    assert example.tokens == (*tokenizer.tokenize("play the red light"), tokenizer.end_token)
    assert example.learned == (False, *[True] * (len(example.tokens) - 1))
    assert example.prompt_length == 1


def test_rows_too_long_are_counted_not_cut(tokenizer: GgufTokenizer) -> None:
    rows = [row("stop", where=f"x:{n}") for n in range(2)] + [row("play " * 90, where=f"x:{n}") for n in range(2, 6)]
    short = len(tokenize_one(rows[0], tokenizer).tokens)
    examples, too_long = tokenize_rows(rows, tokenizer, system=None, loss_on="completion", max_tokens=short)
    assert [len(example.tokens) for example in examples] == [short, short]
    assert too_long == ("x:2", "x:3", "x:4", "x:5")


def test_rows_that_are_all_too_long_are_refused_with_the_length_needed(tokenizer: GgufTokenizer) -> None:
    short = len(tokenize_one(row("stop"), tokenizer).tokens)
    with pytest.raises(UsageError, match=f"all 2 rows are longer than {short - 1} tokens; the shortest has {short};"):
        tokenize_rows(
            [row("play " * 90), row("stop")], tokenizer, system=None, loss_on="completion", max_tokens=short - 1
        )


def test_a_row_that_the_template_refuses_is_named(tiny_gguf: Callable[[str], Path]) -> None:
    strict = GgufTokenizer(tiny_gguf("llama"))
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UsageError, match=r"^rows.jsonl:1: .*no system role"):
        tokenize_one(row("stop"), strict)
    strict.close()


TOOLS = [{"type": "function", "function": {"name": "set_light", "parameters": {"properties": {"on": {}}}}}]
CALLING = [
    {"role": "user", "content": "turn on the light"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "set_light", "arguments": {"on": True}}}]},
]
RESULT = {"role": "tool", "content": "done"}


def with_tools(messages: Sequence[object], tools: object = TOOLS) -> str:
    return json.dumps({"messages": messages, "tools": tools})


def test_a_blank_cell_of_a_table_is_a_row_without_tools(write: Write) -> None:
    table = io.StringIO()
    turns = json.dumps([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Good day."}])
    csv.writer(table).writerows([("messages", "tools"), (turns, json.dumps(TOOLS)), (turns, ""), (turns, " ")])
    assert [row.tools is not None for row in read_rows(write(table.getvalue(), "rows.csv"))] == [True, False, False]


def test_a_row_can_end_with_a_call_of_its_tools(write: Write, tokenizer: GgufTokenizer) -> None:
    (read,) = read_rows(write(with_tools(CALLING)))
    assert json.loads(read.completion or "") == {"tool_calls": [{"name": "set_light", "arguments": {"on": True}}]}
    example = tokenize_one(read, tokenizer)
    assert example.prompt_tokens == tuple(prompt_tokens(tokenizer, messages_for(CALLING[:1], None), tool_set(TOOLS)))
    call = '<tool_call>\n{"name": "set_light", "arguments": {"on": true}}\n</tool_call>'
    assert text_of(learned_of(example)[:-1], tokenizer) == call
    assert '"name": "set_light"' in text_of(example.prompt_tokens, tokenizer)


def test_calls_before_the_last_turn_are_learned_too(write: Write, tokenizer: GgufTokenizer) -> None:
    talk = [*CALLING, RESULT, RESULT, {"role": "assistant", "content": "light on"}]
    (read,) = read_rows(write(with_tools(talk, json.dumps(TOOLS))))
    assert read.completion == "light on"
    learned = text_of(learned_of(tokenize_one(read, tokenizer)), tokenizer)
    assert learned.startswith("<tool_call>")
    assert "done" not in learned
    assert "light on" in learned


@pytest.mark.parametrize("between", [[], [RESULT], [RESULT, RESULT]])
def test_a_request_can_follow_calls_and_results(
    write: Write, tokenizer: GgufTokenizer, between: list[dict[str, str]]
) -> None:
    (read,) = read_rows(write(with_tools([*CALLING, *between, *CALLING])))
    learned = text_of(learned_of(tokenize_one(read, tokenizer)), tokenizer)
    assert learned.count("<tool_call>") == 2
    assert "done" not in learned


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (json.dumps({"messages": CALLING}), "calls 'set_light', but has no tools; add the key tools"),
        (with_tools(CALLING, [{"name": "set_lights"}]), "is not one of its tools; did you mean 'set_lights'?"),
        (with_tools(CALLING, "[{"), "tools is not JSON"),
        (with_tools(CALLING, [{}]), "tool 1 has no name"),
        (with_tools([*CALLING, CALLING[1]]), "message 3 has role assistant, expected user or tool"),
        (with_tools([*CALLING, CALLING[0]]), "the last message has role user, expected assistant"),
        (with_tools([CALLING[0], {"role": "tool", "content": "x"}]), "message 2 has role tool, expected assistant"),
        (with_tools([CALLING[0], {"role": "assistant", "tool_calls": [{}]}]), "message 2 has a tool call without"),
    ],
)
def test_rows_with_calls_that_cannot_be_are_named(write: Write, line: str, told: str) -> None:
    (problem,) = problems_of(write(line))
    assert problem.startswith("1: ")
    assert told in problem
