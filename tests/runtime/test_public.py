from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import edgetune_runtime
import pytest

NAMES = {
    "Answer",
    "AsyncRuntime",
    "AsyncSession",
    "AsyncStream",
    "BusyError",
    "CancelledError",
    "EdgetuneError",
    "Event",
    "IncompatibleError",
    "NotFoundError",
    "OutOfSpaceError",
    "PromptTooLongError",
    "Runtime",
    "Sampling",
    "Session",
    "Stream",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "UsageError",
    "VerificationError",
    "__version__",
}

RUNTIME = {
    "adapters",
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
    "open",
    "perplexity",
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


def test_the_public_names_are_these() -> None:
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


def test_exit_codes_are_those_that_the_commands_promise() -> None:
    codes = {name: getattr(edgetune_runtime, name).exit_code for name in NAMES if name.endswith("Error")}
    assert codes == {
        "EdgetuneError": 1,
        "UsageError": 2,
        "NotFoundError": 3,
        "VerificationError": 4,
        "IncompatibleError": 5,
        "OutOfSpaceError": 6,
        "PromptTooLongError": 2,
        "BusyError": 7,
        "CancelledError": 130,
    }
