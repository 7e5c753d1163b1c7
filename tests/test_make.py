"""Runs the targets of the Makefile that the documentation names and CI does not, in this environment."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADAPTERS = ("command", "intent", "reply")
# What makes the demo's build a matter of seconds.
FEW_ROWS = [
    f"adapters.{name}.data.{key}" for name in ADAPTERS for key in ("rows=40", "validation=null", "held_out=0.2")
]
QUICK = " ".join(
    f"--set {each}" for each in ("training.max_steps=2", "training.precision=fp32", "threads=1", *FEW_ROWS)
)


def make(*arguments: str) -> str:
    """Run make with this environment in place of .venv, as if it had just been installed; what it prints."""
    stamps = [f"--old-file={sys.prefix}/{name}" for name in ("installed", "ready")]
    command = ["make", f"VENV={sys.prefix}", *stamps, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def targets() -> dict[str, set[str]]:
    """The targets of the Makefile, and what each one depends on."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {
        name: set(rest.split()) for name, rest in re.findall(r"^([a-z0-9-]+): ((?:[a-z-]+ )*)?", text, re.MULTILINE)
    }


def with_dependencies(names: set[str]) -> set[str]:
    """These targets, and all that make runs for them."""
    needed = {dependency for name in names for dependency in targets().get(name, ())} & targets().keys()
    return names if needed <= names else with_dependencies(names | needed)


def test_each_target_that_the_documentation_names_runs_in_ci_or_here() -> None:
    named = set()
    for page in ("README.md", "CONTRIBUTING.md"):
        named |= set(
            re.findall(r"^make ([a-z0-9-]+)|`make ([a-z0-9-]+)", (ROOT / page).read_text("utf-8"), re.MULTILINE)
        )
    documented = {first or second for first, second in named}
    in_ci = with_dependencies(
        set(re.findall(r"(?:make|start) ([a-z0-9-]+)", (ROOT / ".ci/run").read_text(encoding="utf-8")))
    )
    here = set(re.findall(r'make\("([a-z0-9-]+)', Path(__file__).read_text(encoding="utf-8")))
    assert documented <= in_ci | here
    assert documented <= targets().keys()


def test_help_lists_the_targets() -> None:
    listed = set(re.findall(r"^make ([a-z0-9-]+)", make("help"), re.MULTILINE))
    assert listed == targets().keys() - {"demo-with-recipe"}


def test_fast_leaves_out_tests_that_train() -> None:
    collected = make("fast", f"PYTEST={sys.executable} -m pytest --collect-only -v {Path(__file__)}")
    assert "test_help_lists_the_targets" in collected
    assert "test_the_demo_builds_and_answers_with_each_adapter" not in collected


def test_the_demo_builds_and_answers_with_each_adapter(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    out = make("demo", f"BUNDLE={tmp_path}/home", f"ARGS=--set base={tiny_gguf('llama')} {QUICK}")
    answers = out.partition("== one prompt, each engine, each adapter")[2]
    assert all(f"\n{name}" in answers for name in ADAPTERS)
    assert "== the app" in answers


def test_the_full_demo_differs_in_recipe_and_bundle_only() -> None:
    full, short = make("demo-full", "--dry-run"), make("demo", "--dry-run")
    named = full.replace("smart-home/recipe.yaml", "smart-home/quick.yaml").replace(
        "build/smart-home-full", "build/smart-home"
    )
    assert full != named == short
