"""Adapters by pattern: reads the files that `adapters: {from: tasks/*.yaml}` names, one adapter each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import UsageError

from edgetune.common.files import expanded

from .problems import NAME, Document, FileMapping, Loc, Plain, read_document, shown

FROM = "from"
"""The key of the patterns among the adapters."""


def with_task_files(document: Document, folder: Path) -> Document:
    """The recipe with the adapters of the files that it names by patterns, which are relative to `folder`.

    A pattern that matches the recipe itself means the other files.

    Raises UsageError with all problems, one per line: patterns that match nothing, files that are not one mapping, and
    names that are used twice.
    """
    adapters = document.values.get("adapters")
    if not isinstance(adapters, dict) or FROM not in adapters or isinstance(adapters[FROM], dict):
        return document
    files, problems = _matching(adapters[FROM], folder, document)
    specs: dict[str, Any] = {name: spec for name, spec in adapters.items() if name != FROM}
    parts: dict[Loc, Document] = {}
    for path in files:
        try:
            part = read_document(path, "adapter")
        except UsageError as error:
            problems.append(str(error))
            continue
        name = part.values.pop(NAME, path.stem)
        line = part.place(part.line((NAME,)))
        if not isinstance(name, str):
            problems.append(f"{line}name: {shown(name)} is not a string; put it in quotes")
        elif name in specs:
            other = parts[loc].path if (loc := ("adapters", name)) in parts else document.path or "the recipe"
            problems.append(f"{line}{other} has an adapter {name!r} too; set another name")
        else:
            specs[name], parts["adapters", name] = FileMapping(part.values, path.parent), part
    if problems:
        raise UsageError("\n".join(problems))
    return replace(document, values={**document.values, "adapters": specs}, parts=parts)


def _matching(patterns: Plain, folder: Path, recipe: Document) -> tuple[list[Path], list[str]]:
    """The files that match, by pattern and then by name, each once; and the problems of the patterns."""
    texts = patterns if isinstance(patterns, list) else [patterns]
    place = recipe.place(recipe.line(("adapters", FROM)))
    files, problems = dict[Path, None](), []
    for text in texts:
        if not isinstance(text, str) or not text:
            problems.append(f"{place}adapters.from: {shown(text)} is not a pattern; write one such as tasks/*.yaml")
            continue
        matching = {
            file: None for file in _files(text, folder) if recipe.path is None or not file.samefile(recipe.path)
        }
        if not matching:
            problems.append(f"{place}adapters.from: no file matches {shown(text)}; patterns are relative to the recipe")
        files |= matching
    return list(files), problems


def _files(pattern: str, folder: Path) -> Iterator[Path]:
    path = expanded(pattern)
    root, relative = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (folder, path)
    try:
        yield from sorted(file for file in root.glob(str(relative)) if file.is_file())
    except (ValueError, RuntimeError):  # no pattern, or a loop of links
        return
