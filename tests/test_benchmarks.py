"""Every benchmark in benchmarks/ can be imported and explains its options; the example of its README runs."""

from __future__ import annotations

from benchmarks.harness.tables import markdown
from benchmarks.harness.turns import in_turns
from benchmarks.harness.worker import WorkerEndedError, in_own_process

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from runtime.bundles import write_bundle

FOLDER = Path(__file__).parents[1] / "benchmarks"
BENCHMARKS = sorted(path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_explains_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {name}.py")
    assert str(module.__doc__).splitlines()[0] in printed


def test_there_are_benchmarks() -> None:
    assert len(BENCHMARKS) > 10


def test_the_benchmark_in_the_readme_writes_its_results(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "home", tiny_gguf("llama"), {})
    script = tmp_path / "engines.py"
    script.write_text((FOLDER / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0])
    command = [sys.executable, script, bundle, "--only", "gguf", "--quick", "--threads", "1", "--out", tmp_path]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = json.loads((tmp_path / "engines.json").read_text(encoding="utf-8"))
    assert result["engines"]["gguf"]["median"] > 0
    assert (result["rounds"], result["threads"]) == (1, 1)
    assert result["machine"]["cores"] == os.cpu_count()
    assert (tmp_path / "engines.md").read_text(encoding="utf-8").strip() == printed.strip()


def test_a_table_leaves_missing_figures_empty() -> None:
    rows = [{"name": "a|b", "ms": {"p50": 1.26}}, {"name": "c", "ms": None}]
    assert markdown(rows, {"setup": "{name}", "p50, ms": "{ms[p50]:.1f}"}) == (
        "| setup | p50, ms |\n| --- | --- |\n| a¦b | 1.3 |\n| c |  |\n"
    )


def test_few_rows_trains_each_way_once_and_resumes(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_rows = import_module("benchmarks.few_rows")

    def run(*ways: str) -> dict[str, Any]:
        setup = ["--base", tiny_gguf("llama"), "--only", "smart-home", "--quick", "--ways", *ways]
        arguments = [*setup, "--work", tmp_path, "--out", tmp_path, "--json"]
        monkeypatch.setattr(sys, "argv", ["few_rows.py", *map(str, arguments)])
        few_rows.main()
        result: dict[str, Any] = json.loads((tmp_path / "few_rows.json").read_text(encoding="utf-8"))
        return result

    (first,) = run("defaults")["runs"]
    trained = tmp_path / "smart-home" / "bundle" / "manifest.json"
    before = trained.stat().st_mtime_ns
    assert run("defaults")["runs"] == [first] and trained.stat().st_mtime_ns == before
    assert (first["rows"], first["test_rows"], first["metric"]) == (12, 4, "json")
    both = run("defaults", "auto")
    assert [figures["way"] for figures in both["runs"]] == ["defaults", "auto"] and both["runs"][0] == first
    assert "| smart-home | 12 |" in (tmp_path / "few_rows.md").read_text(encoding="utf-8")
    assert (tmp_path / "few_rows.png").exists()


def test_quantization_scores_each_way_of_merging(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = ["--base", tiny_gguf("llama"), "--only", "smart-home", "--quick", "--types", "q4_0", "--engines", "gguf"]
    arguments = [*setup, "--work", tmp_path, "--out", tmp_path, "--json"]
    monkeypatch.setattr(sys, "argv", ["quantization.py", *map(str, arguments)])
    import_module("benchmarks.quantization").main()
    result = json.loads((tmp_path / "quantization.json").read_text(encoding="utf-8"))
    assert [run["way"] for run in result["runs"]] == ["separate", "q8_0", "nearest", "on-grid"]
    separate, finer, nearest, on_grid = result["runs"]
    assert separate["val_loss"] == finer["val_loss"] != on_grid["val_loss"]
    assert finer["bytes"] > on_grid["bytes"] and on_grid["kl"] < finer["kl"] + 0.01
    assert nearest["kl"] > 10 * on_grid["kl"]


def test_rounds_take_turns_after_those_that_do_not_count() -> None:
    calls: list[str] = []
    found = in_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 2, warmups=1)
    assert calls == list("ababab")
    assert found == {"a": [3, 5], "b": [4, 6]}


def test_a_process_that_ends_early_is_named_with_its_exit_code() -> None:
    with pytest.raises(WorkerEndedError, match="exit 3"):
        in_own_process(os._exit, 3)
