from __future__ import annotations

import inspect
import re
import subprocess
import sys
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import get_args, get_type_hints

import edgetune_runtime
import pytest
from edgetune_runtime import errors

API = Path(__file__).parents[3] / "docs/reference/api.md"
NAMES = {"__version__", *re.findall(r"^::: edgetune_runtime\.(\w+)$", API.read_text(encoding="utf-8"), re.MULTILINE)}

RUNTIME = {
    "adapters",
    "add_adapter",
    "bundle",
    "classify",
    "clear_cache",
    "close",
    "context_length",
    "contexts",
    "embed",
    "engine",
    "generate",
    "load_session",
    "manifest",
    "negative_log_likelihood",
    "open",
    "perplexity",
    "reload",
    "remove_adapter",
    "route",
    "session",
    "stream",
    "threads",
    "warm",
}

IMPORT_PROBE = """
import sys
before = set(sys.modules)
import edgetune_runtime
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(brought - sys.stdlib_module_names))
"""


def test_the_public_names_are_those_of_the_reference() -> None:
    assert set(edgetune_runtime.__all__) == NAMES
    assert all(getattr(edgetune_runtime, name) for name in NAMES)
    assert set(dir(edgetune_runtime)) == NAMES


def test_the_public_members_are_these(bundle: Path) -> None:
    with edgetune_runtime.Runtime.open(bundle, disk_mb=0) as runtime, runtime.session() as session:
        stream = runtime.stream("play", max_tokens=1)
        stream.close()
        assert public(runtime) == RUNTIME
        assert public(session) == {"adapter", "close", "history", "save", "send", "stream", "use"}
        assert public(stream) == {"answer", "close", "read"}


def test_the_tree_of_errors_has_their_exit_codes() -> None:
    listed = dict(re.findall(r"^[│├└─ ]*(\w+Error) +(\d+)", errors.__doc__ or "", re.MULTILINE))
    classes = [thing for _, thing in inspect.getmembers(errors, inspect.isclass) if issubclass(thing, Exception)]
    assert listed == {error.__name__: str(error.exit_code) for error in classes}


def test_every_type_that_a_public_signature_names_is_public() -> None:
    named = set()
    for name in NAMES:
        thing = getattr(edgetune_runtime, name)
        if inspect.isclass(thing):
            members = [member for key, member in inspect.getmembers(thing) if not key.startswith("_")]
            functions = [member for member in members if inspect.isfunction(member) or inspect.ismethod(member)]
            functions += [member.fget for member in members if isinstance(member, property)]
            functions += [member.func for member in members if isinstance(member, cached_property)]
            for hinted in [thing, *functions]:
                named |= set().union(*map(classes_in, get_type_hints(hinted).values()))
    assert {cls for cls in named if cls.__module__.startswith("edgetune_runtime")} <= {
        getattr(edgetune_runtime, name) for name in NAMES
    }


def classes_in(hint: object) -> set[type]:
    """The classes that a type hint names."""
    arguments = [
        part for argument in get_args(hint) for part in (argument if isinstance(argument, list) else [argument])
    ]
    found = {hint} if isinstance(hint, type) else set()
    return found.union(*map(classes_in, arguments))


def test_a_with_block_ends_its_stream_and_frees_its_context(bundle: Path) -> None:
    with edgetune_runtime.Runtime.open(bundle, disk_mb=0, contexts=1) as runtime:
        with runtime.stream("play", max_tokens=20) as stream:
            next(stream)
        assert list(stream) == [] and stream.answer is None
        assert runtime.generate("play", max_tokens=1).tokens == 1


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_type_checkers_find_the_type_hints() -> None:
    assert files(edgetune_runtime).joinpath("py.typed").is_file()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Runtimes"):
        _ = edgetune_runtime.Runtimes


def test_the_version_is_that_of_the_distribution() -> None:
    assert edgetune_runtime.__version__ == version("edgetune-runtime")


def test_importing_brings_nothing_but_the_standard_library() -> None:
    command = [sys.executable, "-c", IMPORT_PROBE]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == "['edgetune_runtime']\n"
