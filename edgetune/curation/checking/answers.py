"""Finds answers that differ in form from the output or the other answers, and counts the kinds of answers."""

from __future__ import annotations

import difflib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from edgetune_runtime.text.json_text import is_deeper, json_or_none
from edgetune_runtime.tools.calls import is_text_of_call
from edgetune_runtime.tools.formats import SEPARATORS
from edgetune_runtime.wording import first_of

from edgetune.building.outputs.infer import MOST_LEVELS, infer, problem_of
from edgetune.common.choices import is_complete
from edgetune.recipe.parts import Metric
from edgetune.tasks.augmentation.slots import has_value
from edgetune.tasks.data import TaskRow, kind_of
from edgetune.tasks.metrics import EITHER_RIGHT_OR_WRONG, is_list, same_but_for_form, without_label
from edgetune.tasks.task import Task

from .findings import MISFIT, RARE, TRAIN, Finding, SplitRow
from .said_values import text_before, unsaid_texts

_USUAL, _ODD = 0.9, 0.05
"""Share of the answers that makes a form the usual one, and the highest share of an odd one."""
_MISSPELLED = 0.75
"""Least similarity of a misspelled field with the right one."""
_FEW_ROWS, _MOST_KINDS = 5, 100


def misfits(task: Task, rows: Sequence[SplitRow]) -> Iterator[Finding]:
    """The answers of another form than the output or most others, and those with a text that their prompt lacks."""
    found = list(_other_forms(task, rows))
    odd = {where for finding in found for where in finding.where}
    yield from found
    yield from unsaid_texts([item for item in rows if item.row.where not in odd])


def _other_forms(task: Task, rows: Sequence[SplitRow]) -> Iterator[Finding]:
    """The answers that break the recipe's output or the schema of a tool, or have another form than most others.

    Without an output in the recipe, answers that are not trained on are compared with what the training rows suggest.
    """
    spec = None if task.spec.output is None else task.spec.output.spec
    answered = [item for item in rows if item.row.completion is not None and item.row.tools is None]
    for item in rows:
        if item.row.turn is not None and (problem := bad_call(item.row)):
            yield Finding.of(MISFIT, [item], problem)
        elif item.row.tools is not None and is_text_of_call(item.row.completion or ""):
            yield Finding.of(MISFIT, [item], "is the text of a call: give it as `tool_calls`")
    if spec is not None:
        for item in answered:
            if problem := problem_of(spec, item.row):
                yield Finding.of(MISFIT, [item], problem)
    elif task.metric == "label":
        yield from _odd_spellings(task.labels, answered)
        if lists := [item for item in answered if is_list(item.row.completion or "")]:
            yield Finding.of(MISFIT, lists, "labels are lists: each combination is one label")
    else:
        yield from _odd(answered)
        odd = {row.where for row in without_label([item.row for item in rows])} if task.spec.metric == "auto" else set()
        note = "has no label, so the answers are free text, not labels"
        yield from (Finding.of(MISFIT, [item], note) for item in rows if item.row.where in odd)


def _odd_spellings(labels: Sequence[str], rows: Sequence[SplitRow]) -> Iterator[Finding]:
    """The rows with a label that differs only in case or Unicode form from one of more rows."""
    by_label: dict[str, list[SplitRow]] = {label: [] for label in labels}
    for item in rows:
        by_label.setdefault(item.row.completion or "", []).append(item)
    for same in same_but_for_form(labels):
        *odd, usual = sorted(same, key=lambda label: len(by_label[label]))
        for label in filter(by_label.__getitem__, odd):
            note = f"the label {label!r} differs only in case or Unicode form from {usual!r}"
            yield Finding.of(MISFIT, by_label[label], note)


def balance(rows: Sequence[SplitRow], metric: Metric) -> dict[str, dict[str, int]]:
    """The rows of each kind of answer, by split; the most frequent kind first. Empty for answers without kinds.

    The kind of an answer is its label, each function that it calls, or the value of a field that has few values. Texts
    are kinds only if no other answer is right by the `metric`: of free texts, some repeat by chance.
    """
    parsed = [json_or_none(item.row.completion or "") for item in rows]
    field = _kind_field(parsed)
    counted: dict[str, Counter[str]] = {}
    for item, value in zip(rows, parsed, strict=True):
        for kind in _kinds(item.row, value, field, are_texts_kinds=metric in EITHER_RIGHT_OR_WRONG):
            counted.setdefault(kind, Counter())[item.split] += 1
    if not 1 < len(counted) <= _MOST_KINDS or len(counted) * 2 > len(rows):
        return {}
    return {kind: dict(counts) for kind, counts in sorted(counted.items(), key=lambda pair: -pair[1].total())}


def rare(kinds: Mapping[str, Mapping[str, int]], made: str | None) -> Iterator[Finding]:
    """The kinds of answers with few training rows, except `made`, of which a build makes more."""
    for kind, counts in kinds.items():
        trained = counts.get(TRAIN, 0)
        if trained < _FEW_ROWS and kind != made:
            rows = ", ".join(f"{count} in {split}" for split, count in {TRAIN: trained, **counts}.items())
            yield Finding(RARE, (), note=f"{kind}: {rows}")


def bad_call(row: TaskRow) -> str | None:
    """Which function an answer with calls calls with arguments that its schema does not allow."""
    assert row.turn is not None
    assert row.tools is not None
    tools = {tool.name: tool for tool in row.tools.tools}
    for call in row.turn["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if not tools[name].accepts(arguments):
            return f"the arguments of {name} break its schema, or come in another order"
    return None


def _odd(rows: Sequence[SplitRow]) -> Iterator[Finding]:
    """Answers that are not JSON among those that are, with unusual fields or values, or with those of no training row.

    One unusual training row loosens the schema that is inferred from all of them.
    """
    parsed = [json_or_none(item.row.completion or "") for item in rows]
    structured = [isinstance(value, dict | list) for value in parsed]
    if sum(structured) < max(1, _USUAL * len(rows)):
        return
    odd: dict[int, str] = {
        place: f"is not JSON, as {sum(structured)} of {len(rows)} answers are"
        for place, fits in enumerate(structured)
        if not fits
    }
    deep = [
        (place, f"has more than {MOST_LEVELS} levels of lists and objects")
        for place, value in enumerate(parsed)
        if is_deeper(value, MOST_LEVELS)
    ]
    for place, note in itertools.chain(deep, _odd_fields(parsed), _lone_texts(rows, parsed), _lacking(parsed)):
        odd.setdefault(place, note)
    trained = [item.row.completion or "" for place, item in enumerate(rows) if item.split == TRAIN and place not in odd]
    spec = infer(trained)
    for place, item in enumerate(rows):
        if place not in odd and item.split != TRAIN and spec is not None:
            # JSON may be written in more ways than a schema allows, such as after a space.
            plain = json.dumps(parsed[place], ensure_ascii=False, separators=SEPARATORS.get(spec.spacing))
            if not spec.accepts(item.row.completion or "") and not spec.accepts(plain):
                odd[place] = "has a form or a value that no training row has"
    for place in sorted(odd):
        yield Finding.of(MISFIT, [rows[place]], odd[place])


def _odd_fields(parsed: Sequence[object]) -> Iterator[tuple[int, str]]:
    """Positions of values with a misspelled field, or with one of another type than it has nearly everywhere."""
    seen: dict[str, Counter[str]] = {}
    places: dict[tuple[str, str], list[int]] = {}
    for place, value in enumerate(parsed):
        for path, kind in sorted({(path, kind_of(inner)) for path, inner in _fields(value, "")}):
            seen.setdefault(path, Counter())[kind] += 1
            places.setdefault((path, kind), []).append(place)
    few, common = max(1, int(_ODD * len(parsed))), _common_names(seen)
    for path, kinds in seen.items():
        usual, most = kinds.most_common(1)[0]
        if kinds.total() == 1 and (meant := _meant(path, common)):
            yield places[path, usual][0], f"has the field {path}, which no other answer has; {meant} is meant?"
        for kind, count in kinds.items():
            if kind != usual and count <= few and most >= _USUAL * kinds.total():
                yield from ((place, f"{path} is {kind}, and {usual} in {most} answers") for place in places[path, kind])


def _lone_texts(rows: Sequence[SplitRow], parsed: Sequence[object]) -> Iterator[tuple[int, str]]:
    """Positions of values with a text that no other answer has, in a field with few, frequent texts.

    One that the prompt has is right, unless the prompt also has another one that it is a misspelled form of.
    """
    texts: dict[str, Counter[str]] = {}
    places: dict[tuple[str, str], int] = {}
    for place, value in enumerate(parsed):
        for path, text in _fields(value, ""):
            if isinstance(text, str):
                texts.setdefault(path, Counter())[text] += 1
                places[path, text] = place
    for path, counts in texts.items():
        lone = [text for text, count in counts.items() if count == 1]
        usual = Counter({text: count for text, count in counts.items() if count > 1})
        is_closed = is_complete(usual) and min(usual.values()) >= _FEW_ROWS
        if is_closed and len(lone) <= max(1, int(_ODD * counts.total())):
            for text in lone:
                place = places[path, text]
                near = difflib.get_close_matches(text, usual, n=1, cutoff=_MISSPELLED)
                before = text_before(rows[place].row)
                if has_value(before, text) and not (near and has_value(before, near[0])):
                    continue
                others = first_of([repr(other) for other in usual], separator=", ")
                meant = f"{near[0]!r} is meant?" if near else f"the others have {others}"
                yield place, f"{path} is {text!r} in no other answer; {meant}"


def _lacking(parsed: Sequence[object]) -> Iterator[tuple[int, str]]:
    """Positions of objects without a field that nearly all others of their kind have."""
    field = _kind_field(parsed)
    kinds: dict[str | None, dict[int, dict[str, object]]] = {}
    for place, value in enumerate(parsed):
        if isinstance(value, dict):
            kind = None if field is None else json.dumps(value.get(field))
            kinds.setdefault(kind, {})[place] = value
    for kind, objects in kinds.items():
        alike = "" if kind is None else f" with {field} {kind}"
        for name, count in Counter(itertools.chain.from_iterable(objects.values())).items():
            if (1 - _ODD) * len(objects) <= count < len(objects):
                note = f"has no {name}, which {count} of {len(objects)} answers{alike} have"
                yield from ((place, note) for place, value in objects.items() if name not in value)


def _common_names(seen: Mapping[str, Counter[str]]) -> dict[str, list[str]]:
    """The names of the fields of several values by their parent, without parents whose names are data.

    Most of the fields of these are in one value.
    """
    fields: dict[str, dict[str, bool]] = {}
    for path, kinds in seen.items():
        parent, _, name = path.rpartition(".")
        fields.setdefault(parent, {})[name] = kinds.total() > 1
    return {
        parent: [name for name, is_common in names.items() if is_common]
        for parent, names in fields.items()
        if 2 * sum(names.values()) >= len(names)
    }


def _meant(path: str, common: Mapping[str, Sequence[str]]) -> str | None:
    """The field of several values that is spelled nearly like this one."""
    parent, dot, name = path.rpartition(".")
    near = difflib.get_close_matches(name, common.get(parent, ()), n=1, cutoff=_MISSPELLED)
    return f"{parent}{dot}{near[0]}" if near else None


def _fields(value: object, path: str) -> Iterator[tuple[str, object]]:
    """The path and the value of each field; null says nothing about a type."""
    if isinstance(value, dict):
        for key, inner in value.items():
            inner_path = f"{path}.{key}" if path else str(key)
            if inner is not None:
                yield inner_path, inner
            yield from _fields(inner, inner_path)
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner, f"{path}[]")


def _kind_field(parsed: Sequence[object]) -> str | None:
    """The field whose texts tell kinds of objects apart: the one in most of them, of these that with the fewest."""
    objects = [value for value in parsed if isinstance(value, dict)]
    texts: dict[str, list[str]] = {}
    for value in objects:
        for key, text in value.items():
            if isinstance(text, str):
                texts.setdefault(key, []).append(text)
    fitting = {key: values for key, values in texts.items() if 1 < len(set(values)) <= len(values) / 2}
    return min(fitting, key=lambda key: (-len(fitting[key]), len(set(fitting[key]))), default=None)


def _kinds(row: TaskRow, value: object, field: str | None, *, are_texts_kinds: bool) -> set[str]:
    if row.tools is not None:
        called = {call["function"]["name"] for call in row.turn["tool_calls"]} if row.turn is not None else set()
        return called or {"no call"}
    if isinstance(value, dict):
        return set() if field is None else {str(value.get(field, f"without {field}"))}
    if isinstance(value, list):
        return {f"list of {len(value)}"}
    return {row.completion} if are_texts_kinds and row.completion is not None else set()
