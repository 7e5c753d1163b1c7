from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import NotFoundError, UsageError
from recipes import write_rows

from edgetune.api import plan
from edgetune.common.progress import Progress
from edgetune.planning.training import choose_training
from edgetune.proposal import files as data_files
from edgetune.proposal.recipe import recipe_for
from edgetune.proposal.writing import recipe_to_build
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import read_task

QUIET = Progress(quiet=True)
THINGS = [
    f"the {thing} in the {room}" for thing in ("lamp", "fan") for room in ("hall", "attic", "study", "den", "loft")
]
KINDS = [
    *({"text": f"turn off {thing}", "label": "order"} for thing in THINGS),
    *({"text": f"is {thing} on", "label": "question"} for thing in THINGS),
]
TOOLS = [{"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "stop", "arguments": {}}}]}

Write = Callable[..., Path]
Make = Callable[..., Recipe]


@pytest.fixture
def base(tiny_gguf: Callable[[str], Path]) -> str:
    return str(tiny_gguf("llama"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, content)`: a file of rows, as JSON lines or as a table with a header, or of this text."""

    def make(name: str, content: str | bytes | Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            return write_rows(path, content)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


@pytest.fixture
def propose(base: str, tmp_path: Path) -> Make:
    """`propose(*files)`: the recipe for these files, read again from its text."""

    def make(*paths: Path) -> Recipe:
        target = tmp_path / "recipe.yaml"
        made = recipe_for(paths, base=base, path=target)
        target.write_text(made.text, encoding="utf-8")
        recipe = Recipe.from_file(target)
        assert recipe.model_dump() == made.recipe.model_dump()
        return recipe

    return make


def numbered(values: dict[str, Any], count: int = 20) -> list[dict[str, Any]]:
    """Rows with these values; `{}` in a text becomes the row's number."""
    return [
        {key: value.format(n) if isinstance(value, str) else value for key, value in values.items()}
        for n in range(count)
    ]


def talk(number: int) -> list[dict[str, str]]:
    """A conversation of three messages."""
    return [
        {"role": "system", "content": "Be: short"},
        {"role": "user", "content": f"hi {number}"},
        {"role": "assistant", "content": "Hello there, how are you?"},
    ]


def test_a_table_of_two_kinds_becomes_a_recipe_that_validates(write: Write, propose: Make) -> None:
    recipe = propose(write("Requests 1.csv", [{"Sentence": row["text"], "Kind": row["label"]} for row in KINDS]))
    spec = recipe.adapters["requests-1"]
    assert recipe.name == "requests-1"
    assert spec.data.columns is not None
    assert (spec.data.columns.prompt, spec.data.columns.completion) == ("Sentence", "Kind")
    assert (spec.labels, spec.metric, spec.system) == (("order", "question"), "label", "Name the kind.")
    adapters = plan(recipe).adapters
    assert [*adapters] == ["requests-1"]
    planned = adapters["requests-1"]
    assert planned.rows is not None
    assert (planned.metric, planned.rows.train, planned.rows.validation, len(planned.labels)) == ("label", 18, 2, 2)


@pytest.mark.parametrize("name", ["kind.csv", "kind.jsonl"])
def test_white_space_around_a_label_makes_no_other_label(write: Write, propose: Make, name: str) -> None:
    rows = [{"Sentence": row["text"], "Kind": row["label"] + " " * (n % 2)} for n, row in enumerate(KINDS)]
    assert propose(write(name, rows)).adapters["kind"].labels == ("order", "question")


@pytest.mark.parametrize(
    ("rows", "columns", "metric"),
    [
        (numbered({"prompt": "call {}", "completion": {"number": 1}}), None, "json"),
        (numbered({"text": "page {} of a book"}), None, "perplexity"),
        (numbered({"id": "{}", "body": "page {} of a book"}), {"text": "body"}, "perplexity"),
        (
            numbered({"answer": "this is reply {}", "question": "what is {}"}),
            {"prompt": "question", "completion": "answer"},
            "rouge_l",
        ),
        (
            numbered({"instruction": "Sum up.", "input": "text {}", "output": "n{}"}),
            {"prompt": "input", "completion": "output"},
            "exact",
        ),
        (
            numbered({"instruction": "Sum up {}.", "input": "", "output": "n{}"}),
            {"prompt": "instruction", "completion": "output"},
            "exact",
        ),
        (
            numbered({"id": 7, "said": "lamp {} off", "area": "hall {}", "turn": "x{}"}),
            {"prompt": "said", "completion": ["area", "turn"]},
            "json",
        ),
        (numbered({"prompt": "a {}", "label": "b{}"}), {"prompt": "prompt", "completion": "label"}, "exact"),
        (
            numbered({"row": "{}", "tweetid": "{}7", "text": "wake me at {}", "time": "07:{}"}),
            {"prompt": "text", "completion": "time"},
            "exact",
        ),
        (numbered({"text": "film {}", "score": "3.{}"}), {"prompt": "text", "completion": "score"}, "exact"),
        (
            [{"said": f"lamp {n}", "do": f"x{n}", **({"area": f"hall {n}"} if n % 3 else {})} for n in range(20)],
            {"prompt": "said", "completion": "do"},
            "exact",
        ),
        ([{"messages": talk(n)} for n in range(9)], None, "rouge_l"),
        ([{"chat": talk(n), "x": 1} for n in range(9)], {"messages": "chat"}, "rouge_l"),
        ([{"text": f"text {n}", "weight": 0.5} for n in range(9)], None, "perplexity"),
    ],
)
def test_columns_and_metric_are_found_by_names_and_values(
    write: Write, propose: Make, rows: list[dict[str, Any]], columns: dict[str, Any] | None, metric: str
) -> None:
    spec = (recipe := propose(write("task.jsonl", rows))).adapters["task"]
    found = None if spec.data.columns is None else spec.data.columns.model_dump(mode="json", exclude_unset=True)
    assert (found, spec.metric) == (columns, metric)
    assert (spec.output is not None) == (metric == "json")
    assert read_task("task", recipe).metric == metric


def test_columns_of_which_none_is_surely_the_answer_are_named(write: Write, propose: Make) -> None:
    path = write("t.csv", numbered({"text": "film {} ended", "time": "07:{}", "score": "3.{}"}))
    assert propose(path).adapters["t"].metric == "perplexity"
    assert "not used: time, score" in path.with_name("recipe.yaml").read_text(encoding="utf-8")


def test_columns_that_few_rows_fill_are_named(write: Write, propose: Make) -> None:
    rows = numbered({"question": "call {} at home", "answer": "calls {} of them now"})
    propose(path := write("t.jsonl", [{**row, "system": "Be kind." * (n < 3)} for n, row in enumerate(rows)]))
    comments = path.with_name("recipe.yaml").read_text(encoding="utf-8").replace("#", " ")
    assert "not used: system (3 of 20 rows)" in " ".join(comments.split())
    rows = numbered({"instruction": "sum up {}", "output": "sum {} of it"})
    path = write("t.jsonl", [{**row, "input": "a text" * (n < 3)} for n, row in enumerate(rows)])
    with pytest.raises(UsageError, match=r"3 of 20 rows of .*t\.jsonl have 'input' beside 'instruction'"):
        propose(path)


def test_a_header_is_told_from_a_row(write: Write, propose: Make) -> None:
    rows = "".join(f"{row['text']},{row['label']}\n" for row in KINDS)
    with pytest.raises(UsageError, match=r"kind\.csv looks like a row, because 'order' is also an answer"):
        propose(write("kind.csv", rows))
    assert propose(write("kind.csv", f"text,order\n{rows}")).adapters["kind"].labels == ("order", "question")


def test_a_row_without_a_label_among_labelled_ones_is_named(write: Write, propose: Make) -> None:
    path = write("kind.jsonl", [*KINDS, {"text": "what is it"}])
    assert propose(path).adapters["kind"].metric == "exact"
    comments = path.with_name("recipe.yaml").read_text(encoding="utf-8").replace("#", " ")
    doubt = f"; 1 of 21 rows have no label, such as {path}:21, so the answers are free text, not labels metric: exact"
    assert "".join(doubt.split()) in "".join(comments.split())


def test_nothing_is_inferred_from_rows_of_weight_0(write: Write, propose: Make) -> None:
    path = write("kind.jsonl", [*KINDS, {"text": "note it", "label": "ordr", "weight": 0}])
    labels = propose(path).adapters["kind"].labels
    assert labels and "ordr" not in labels
    with pytest.raises(UsageError, match=r"all 21 rows, such as .*, have weight 0"):
        propose(write("kind.jsonl", [{**row, "weight": 0} for row in [*KINDS, KINDS[0]]]))


def test_labels_that_differ_only_in_case_are_doubted(write: Write, propose: Make) -> None:
    path = write("kind.jsonl", [*KINDS, *({"text": f"please {n}", "label": "Order"} for n in range(2))])
    propose(path)
    comments = path.with_name("recipe.yaml").read_text(encoding="utf-8").replace("#", " ")
    assert "the labels 'Order' and 'order' differ only in case or Unicode form" in " ".join(comments.split())


def test_an_encoder_gets_a_recipe_that_a_build_can_follow(
    write: Write, tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    base, target = str(tiny_encoder("bert")), tmp_path / "recipe.yaml"
    target.write_text(recipe_for([write("kind.jsonl", KINDS)], base=base, path=target).text, encoding="utf-8")
    recipe = Recipe.from_file(target)
    assert (recipe.task, recipe.context_length, recipe.adapters["kind"].system) == ("text-classification", 64, None)
    assert plan(recipe).adapters["kind"].labels == ("order", "question")
    texts = write("talk.jsonl", [{"prompt": thing, "completion": f"{thing} is off"} for thing in THINGS])
    with pytest.raises(UsageError, match="which only chooses labels, and the answers of talk are other texts"):
        recipe_for([texts], base=base, path=target)


def test_a_system_prompt_that_all_rows_have_becomes_that_of_the_task(
    write: Write, propose: Make, tmp_path: Path
) -> None:
    files = [
        write("talk.jsonl", [{"messages": talk(n)} for n in range(9)]),
        write("sum.jsonl", numbered({"instruction": "Sum up.", "input": "text {}", "output": "n{}"})),
        write(
            "chat.jsonl",
            [{"system": "Be kind.", "chat": talk(n)[1:], "mood": f"m{n}", "weight": n % 2} for n in range(9)],
        ),
    ]
    recipe = propose(*files)
    assert [spec.system for spec in recipe.adapters.values()] == ["Be: short", "Sum up.", "Be kind."]
    assert "not used: mood\n" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")


def test_of_different_system_prompts_the_most_frequent_one_is_proposed(write: Write, propose: Make) -> None:
    def proposed(days: int) -> str | None:
        first = [{"role": "system", "content": f"Today is day {n}."} for n in range(days)]
        rows = [{"messages": [first[n % days], *talk(n)[1:]]} for n in range(10)]
        return propose(write("talk.jsonl", rows)).adapters["talk"].system

    assert [proposed(days) for days in (1, 4, 10)] == ["Today is day 0.", "Today is day 0.", None]


def test_conversations_with_tools_under_other_names_are_read(write: Write, propose: Make) -> None:
    rows = [{"dialog": [{"role": "user", "content": f"stop {n}"}, CALL], "functions": TOOLS} for n in range(8)]
    recipe = propose(write("calls.jsonl", rows))
    (task,) = (read_task("calls", recipe),)
    assert task.train[0].tools is not None
    assert task.spec.output is None, "the tools constrain the answers"


def test_few_rows_get_more_epochs_smaller_steps_and_enough_validation_for_a_confidence(
    write: Write, propose: Make
) -> None:
    def settings(rows: int) -> tuple[float, int, float]:
        recipe = propose(write("t.jsonl", numbered({"prompt": "p {}", "completion": "c {}"}, rows)))
        spec = recipe.adapters["t"]
        trained = round(rows * (1 - spec.data.held_out))
        # A plan would read all rows.
        many = choose_training(recipe.training.under(spec.training), trained, None, "exact")[0]
        training = many if rows > 1000 else plan(recipe).adapters["t"].training
        return training.epochs, training.batch_size, spec.data.held_out

    assert [settings(rows) for rows in (10, 90, 150, 600, 1000, 3000, 22_200)] == [
        (20, 4, 0.1), (20, 4, 0.1), (20, 8, 0.2), (8, 8, 0.1), (6, 8, 0.1), (3, 16, 0.1), (1, 16, 0.09009),
    ]  # fmt: skip


def test_rows_that_get_no_confidence_hold_out_none_for_it(write: Write, propose: Make) -> None:
    path = write("t.jsonl", numbered({"prompt": "p {}", "completion": "an answer of several words {}"}, 150))
    assert propose(path).adapters["t"].data.held_out == 0.1
    assert "confidence" not in path.with_name("recipe.yaml").read_text(encoding="utf-8")


def test_each_answer_of_a_conversation_counts_for_its_confidence(write: Write, propose: Make) -> None:
    answer = {"role": "assistant", "content": "Hello"}
    rows = [{"messages": [m for turn in range(4) for m in (talk(9 * n + turn)[1], answer)]} for n in range(30)]
    path = write("talk.jsonl", rows)
    assert propose(path).adapters["talk"].data.held_out == 0.2
    comments = path.with_name("recipe.yaml").read_text(encoding="utf-8").replace("#", " ")
    assert "about 6 of 30 rows with 24 answers" in " ".join(comments.split())


def test_changed_copies_are_for_few_rows_whose_prompts_have_values_of_the_answer(write: Write, propose: Make) -> None:
    def augments(completion: Callable[[int], object], rows: int) -> bool:
        pairs = [{"prompt": f"page {n} please", "completion": completion(n)} for n in range(rows)]
        return propose(write("t.jsonl", pairs)).adapters["t"].data.augment is not None

    assert augments(lambda n: {"page": n}, 30)
    assert not augments(lambda n: {"page": n}, 600)
    assert not augments(lambda n: {"is_open": n % 2 == 0}, 30)
    assert not augments(lambda n: f"page {n}", 30)
    assert not augments(lambda n: {"text": str(n), "start": 5, "length": len(str(n))}, 30)
    assert not augments(lambda _: '{"page": NaN}', 30)


def test_the_context_fits_the_longest_row_within_the_base(write: Write, propose: Make) -> None:
    def context(text: str, other: str = "p {}", others: int = 20) -> int:
        rows = [*numbered({"prompt": other, "completion": "c"}, others), {"prompt": text, "completion": "c"}]
        return propose(write("t.jsonl", rows)).context_length

    assert context("p") == 256
    assert context("a b " * 80) == 384 or context("a b " * 80) == 512
    assert context("a b " * 2000) == 512, "the tiny base was trained for 512"
    assert context("電気を" * 26, "a b " * 20 + "{}", 120) > context("p", "a b " * 20 + "{}", 120)


def test_a_base_that_must_be_downloaded_first_gives_an_estimate(write: Write) -> None:
    rows = [*numbered({"prompt": "p {}", "completion": "c"}), {"prompt": "p" * 3000, "completion": "c"}]
    made = recipe_for([write("t.jsonl", rows)], base="owner/name")
    assert made.recipe.context_length == 1408
    assert "the longest row of t has about 1,0" in made.text


def test_the_commands_in_a_recipe_work_for_any_path(
    write: Write, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = recipe_for([write("kinds.jsonl", KINDS)], base=base, path=Path("-my recipe.yaml")).text
    assert "#   edgetune plan './-my recipe.yaml'\n" in text
    assert "#   edgetune build './-my recipe.yaml' --out build/kinds\n" in text


def test_files_are_relative_to_the_recipe_and_roles_are_read_from_names(
    write: Write, propose: Make, tmp_path: Path
) -> None:
    paths = [write(f"rows/kind-{role}.jsonl", KINDS) for role in ("test", "train", "validation")]
    recipe = propose(*paths)
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert "train: rows/kind-train.jsonl" in text
    assert "kind-test.jsonl is for `edgetune evaluate`" in text
    data = recipe.adapters["kind"].data
    assert data.validation == str(tmp_path / "rows/kind-validation.jsonl")
    assert "held_out" not in text
    assert list(propose(paths[0]).adapters) == ["kind-test"]


def test_only_the_start_of_a_large_file_is_read_and_the_recipe_says_so(
    write: Write, propose: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "SAMPLE_BYTES", 400)
    rows = "text,label\n" + "".join(f'"{row["text"]}\n!",{row["label"]}\n' for row in KINDS * 100)
    spec = propose(write("kind.csv", rows)).adapters["kind"]
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert re.search(r"the first \d+ of about \d,\d{3} rows \(", text)
    assert spec.labels is None, "the rest may have other labels"
    assert spec.metric != "json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", '[{"text": "' + "é" * 300 + '"}]', "t.json is one JSON list; write one object per line: jq -c"),
        ("t.jsonl", '{"text": "' + "é" * 300 + '"}\n', "no row of "),
        ("t.csv", "text\n" + "é" * 300, "no row of "),
    ],
)
def test_a_file_whose_first_row_is_longer_than_what_is_read_is_not_called_empty(
    name: str, content: str, message: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "SAMPLE_BYTES", 401)
    with pytest.raises(UsageError) as caught:
        recipe_for([write(name, content)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv has no rows; add at least two rows"),
        ("t.csv", "text,label\n", "t.csv has no rows; add at least two rows"),
        (
            "t.csv",
            "id,score\n1,2\n2,3\n",
            "t.csv has no usable columns; there are: id (2 values), score (2 values); give a",
        ),
        (
            "t.jsonl",
            '{"text": "a"}\n{"prompt": "b", "completion": "c"}\n{"q": "d"}',
            "t.jsonl has no column that half of its rows fill; there are: text, prompt, completion, q; write",
        ),
        ("t.csv", ",answer\na,b\nc,d\n", "t.csv has no usable columns; there are: answer (2 values); give a"),
        ("t.csv", "text,label\nKüche,a\n".encode("latin-1"), "t.csv:2: not UTF-8 text at byte"),
        ("t.txt", "text", "has an unknown file type; use a .jsonl, .csv or .tsv file"),
        ("t.json", '[\n{"text": "a"}\n]', "t.json is one JSON list; write one object per line: jq -c"),
        ("t.jsonl", "text", "t.jsonl:1: not JSON"),
        ("t.jsonl", '{"text": "a"}', "only 1 row cannot be split for validation"),
        (
            "t.jsonl",
            '{"chat": [{"from": "human", "value": "a"}]}',
            "'chat' has messages of from and value; write them as",
        ),
        (
            "t.jsonl",
            '{"messages": []}\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "t.jsonl:1: messages is empty; give at least one message",
        ),
    ],
)
def test_a_file_without_use_is_one_clear_line(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_for([write(name, content)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_files_of_one_name_and_a_missing_file_are_refused(write: Write, tmp_path: Path) -> None:
    one, other = write("a/faq.csv", KINDS), write("b/FAQ.csv", KINDS)
    with pytest.raises(UsageError, match=r"faq\.csv and .*FAQ\.csv would both make the adapter 'faq'; rename one"):
        recipe_for([one, other])
    with pytest.raises(NotFoundError, match=r"no data file .*none\.csv; check the path"):
        recipe_for([tmp_path / "none.csv"])


def test_semicolons_of_a_spreadsheet_are_read(write: Write, propose: Make) -> None:
    recipe = propose(write("kind.csv", "text;label\n" + "".join(f"{row['text']};{row['label']}\n" for row in KINDS)))
    assert recipe.adapters["kind"].labels == ("order", "question")


def test_texts_of_users_are_quoted_as_yaml_needs(write: Write, propose: Make) -> None:
    labels = ("yes", "no: maybe", "# 0", "é\u2028b", "null", "😀", "1", "? unknown", "a\x85b", "élan", "\x07b", "1e5")
    rows = [{"a: #b": f"text {n}", "c\n- d": labels[n % 12]} for n in range(120)]
    assert propose(write("t.jsonl", rows)).adapters["t"].labels == tuple(sorted(labels))


def test_the_recipe_is_beside_the_bundle_whatever_path_names_it(write: Write, base: str, tmp_path: Path) -> None:
    recipe = recipe_to_build([write("kinds.jsonl", KINDS)], tmp_path / "home/parts/..", base, QUIET)
    assert (recipe, Recipe.from_file(recipe).name) == (tmp_path / "home.yaml", "home")


def test_no_recipe_is_made_for_a_bundle_that_cannot_be_written(
    write: Write, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    with pytest.raises(UsageError, match="is the folder that you are in"):
        recipe_to_build([write("kinds.jsonl", KINDS)], Path(), base, QUIET)
    assert not (tmp_path / "home.yaml").exists()


@pytest.mark.parametrize("name", ["2024", "1e5", "null", "true", 105 * "n"])
def test_a_file_may_be_named_like_a_number_or_null_or_at_length(name: str, write: Write, propose: Make) -> None:
    assert list(propose(write(f"{name}.jsonl", KINDS)).adapters) == [name[:100]]


def test_the_tutorial_shows_what_init_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs/tutorials/your-own-data.md").read_text(encoding="utf-8")
    rows, recipe = re.findall(r"```(?:json|yaml)\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("timer.jsonl").write_text(rows, encoding="utf-8")
    assert recipe_for(["timer.jsonl"]).text == recipe
