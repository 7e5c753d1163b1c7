"""Reads the entries of row files: JSON lines, tables, rows in memory and datasets of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.type_checks import refuse_constant
from edgetune_runtime.wording import shortened

from edgetune.recipe.data import HUB_ID, is_hub_id
from edgetune.recipe.rows import Rows, with_label_names

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = ";\t|"
_DELIMITER_LINE = re.compile(r'"?sep=([,;\t|])"?(?=[\r\n])', re.IGNORECASE)
_QUOTING = 'check the quotation marks in this row: "a ""b"" c" is the text a "b" c'
_LONGEST_CELL = 2**31 - 1
"""The most characters that csv takes as a limit on all systems."""


class BadRowError(Exception):
    """The reason why a row cannot be used."""


def entries(source: str | Rows, most_bytes: int | None = None) -> Iterator[tuple[str, Any]]:
    """Where each entry of `source` is, and its values, or a BadRowError instead of the values.

    Of a file larger than `most_bytes`, only the lines that end within them. Raises the errors of `read_rows` for files.
    """
    if isinstance(source, Rows):
        return _json_lines(f"{source} row ", source.lines)
    path = Path(source)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in JSONL_SUFFIXES:
            text = read_text(path, most_bytes)
            if text.lstrip().startswith("["):
                remedy = f"write one object per line: jq -c '.[]' {source} > rows.jsonl"
                raise UsageError(f"{source} is one JSON list", remedy)
            if most_bytes is not None and "\n" not in text and path.stat().st_size > most_bytes:
                return iter(())  # the first line is longer
            # Not splitlines(): it also splits at U+2028, which JSON strings may contain.
            return _json_lines(f"{source}:", text.split("\n"))
        if suffix in DELIMITERS:
            return _table_rows(source, *_table(source, read_text(path, most_bytes), suffix))
        raise UsageError(f"{source} has an unknown file type", "use a .jsonl, .csv or .tsv file, or a hub id")
    if path.is_dir():
        raise UsageError(f"{source} is a folder", "use a .jsonl, .csv or .tsv file in it")
    if is_hub_id(source):
        return _hub_rows(source)
    raise NotFoundError(f"no data file {source}", "check the path; a hub id has the form owner/name, without a suffix")


def read_text(path: Path, most_bytes: int | None = None) -> str:
    """The text of a UTF-8 file, of a larger one the lines within `most_bytes`, or the start of the first one.

    UsageError for a file that is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(-1 if most_bytes is None else most_bytes)
            is_cut = bool(file.read(1))
        if is_cut and b"\n" in data:
            data = data[: data.rfind(b"\n") + 1]
        # The start of a line may end within a character.
        return getincrementaldecoder("utf-8")().decode(data, final=not is_cut).removeprefix("\ufeff")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text at byte {error.start}", "save the file as UTF-8") from error


def _table(source: str, text: str, suffix: str) -> tuple[str, str]:
    """The text of a table and its delimiter: some programs write a .csv file with other ones, or a first line sep=;."""
    usual = DELIMITERS[suffix]
    if suffix != ".csv":
        return text, usual
    if stated := _DELIMITER_LINE.match(text):
        # The end of the line stays, so that the numbers of the others do.
        return text[stated.end() :], stated[1]
    return text, max(usual, *_OTHER_DELIMITERS, key=lambda delimiter: _columns_by(delimiter, source, text))


def _columns_by(delimiter: str, source: str, text: str) -> tuple[int, int]:
    """How many whole names of columns the delimiter gives, and how many names in all.

    A name after a space, as after a comma in a sentence, or with a quotation mark may be a part of another.
    """
    try:
        _, names = next(_records(source, text, delimiter, skipinitialspace=False), (0, []))
    except UsageError:
        return 0, 0
    return sum(re.fullmatch(r'[^\s"][^"]*', name) is not None for name in names), len(names)


def _json_lines(place: str, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The values of each line that is not empty, at `place` with the line's number."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json_values(line)
        except BadRowError as error:
            values = error
        except json.JSONDecodeError as error:
            values = BadRowError(f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            values = BadRowError(f"not JSON: {error}")
        yield f"{place}{number}", values


def json_values(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """The values of a JSON text. Raises BadRowError for one that Python would read as another value than it says, and
    what `json.loads` raises."""
    return json.loads(text, parse_constant=refuse_constant, parse_float=_finite, object_pairs_hook=_with_keys_once)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadRowError(f"the number {shortened(text)} is too large")
    return number


def _with_keys_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRowError(f"the key {twice!r} appears twice; keep one")
    return values


def _table_rows(source: str, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    header: list[str] | None = None
    for line, fields in _records(source, text, delimiter):
        if header is None:
            header = [name.strip() for name in fields]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise UsageError(f"{source}:{line}: there are two columns {twice[0]!r}", "rename one of them")
        elif len(fields) != len(header):
            yield f"{source}:{line}", BadRowError(f"has {len(fields)} fields, the header has {len(header)}")
        else:
            yield f"{source}:{line}", _by_name(header, fields)


def _records(
    source: str, text: str, delimiter: str, *, skipinitialspace: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """The line and the fields of the header and of each row that is not empty. UsageError for a wrong quotation."""
    # One limit for all of the process: put back afterwards, it would stop another thread in the middle of a table.
    csv.field_size_limit(_LONGEST_CELL)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=skipinitialspace)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            # After a missing quotation mark the following rows cannot be separated.
            raise UsageError(f"{source}:{line}: {error}", _QUOTING) from error
        if fields is None:
            return
        # Many programs write such tables without quotation marks, so that one in a text may join rows.
        if delimiter == "\t" and any("\t" in field and "\n" in field for field in fields):
            message = f"{source}:{line}: a cell in quotation marks has a tab and a line break"
            raise UsageError(message, _QUOTING)
        if any(field.strip() for field in fields):
            yield line, fields


def _by_name(header: Sequence[str], fields: Sequence[str]) -> dict[str, str] | BadRowError:
    """The fields by the names of their columns, without empty ones of columns without a name.

    One column may have fields but no name, as that of row numbers in tables of pandas.
    """
    filled = [place for place, field in enumerate(fields) if header[place] or field.strip()]
    unnamed = [place for place in filled if not header[place]]
    if unnamed and header.count("") > 1:
        return BadRowError(f"column {unnamed[0] + 1} has a value but no name; name it in the header, or clear it")
    return {header[place]: fields[place] for place in filled}


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets  # noqa: PLC0415 - slow to import, and not needed for files

    match = HUB_ID.fullmatch(source)
    name, config, part = (match["id"], match["config"], match["split"]) if match else (source, None, None)
    try:
        loaded = datasets.load_dataset(name, config, split=part or "train")
    except Exception as error:  # datasets passes on all errors of its file systems, parsers and HTTP clients
        reason = " ".join(str(error).split())[:200]
        remedy = "check the id, the network and your token; if it is a file, add its suffix"
        raise NotFoundError(f"cannot load {source} from the hub: {reason}", remedy) from error
    for number, values in enumerate(with_label_names(loaded), 1):
        yield f"{source}:{number}", {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The value without null in its objects: in data sets, all objects of a column have the fields of any."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value
