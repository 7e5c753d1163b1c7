from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.cli import main
from edgetune_runtime.errors import VerificationError
from runtime.bundles import LIGHT_ON, add_golden, change_manifest

ENGINES = ("gguf", "onnx")
Checked = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def checked(capsys: pytest.CaptureFixture[str]) -> Checked:
    """`checked(bundle, *options)`: exit code, output as JSON with `--json`, and standard error of `check`."""

    def call(bundle: Path, *options: str) -> tuple[int, Any, str]:
        code = main(["check", str(bundle), *options])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in options else out, err

    return call


def with_golden(bundle: Path, out: Path, engines: tuple[str, ...], prompt: Any = LIGHT_ON.prompt) -> Path:  # noqa: ANN401
    """A copy of the bundle whose adapters have the answers of this machine as golden ones."""
    copy = Path(shutil.copytree(bundle, out))
    question = replace(LIGHT_ON, prompt=prompt, margin=0.5)
    return add_golden(copy, engines, dict.fromkeys(read_manifest(copy).adapters, question))


def entry_of(raw: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = raw["adapters"][name]
    return entry


@pytest.fixture(scope="module")
def golden(both_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_golden(both_of("llama"), tmp_path_factory.mktemp("golden") / "home", ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_answers_are_no_error(golden: Path, checked: Checked, engine: str) -> None:
    assert checked(golden, "--engine", engine) == (0, "command\tsame\ntone\tsame\nwhole\tsame\n", "")
    code, told, err = checked(golden, "--engine", engine, "--json")
    assert (code, err, list(told)) == (0, "", ["command", "tone", "whole"])
    assert told["command"]["expected"] == told["command"]["answer"] != ""
    assert (told["command"]["margin"], told["command"]["same"]) == (0.5, True)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_confined_check_gives_the_same_answers(golden: Path, engine: str, tmp_path: Path) -> None:
    # Confined for the rest of its life, so in a process of its own, whose output goes to a file.
    command = [sys.executable, "-m", "edgetune_runtime", "check", str(golden), "--engine", engine, "--confined"]
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert (done.returncode, text) == (0, "command\tsame\ntone\tsame\nwhole\tsame\n")
    # onnxruntime may complain that it cannot store an identifier.
    assert "edgetune" not in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_a_different_answer_is_one_line_and_an_error(
    golden: Path, checked: Checked, engine: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(golden, tmp_path / "home"))
    before = read_manifest(copy).adapters["command"].golden[engine].answer
    change_manifest(copy, lambda raw: entry_of(raw, "command")["golden"][engine].update(answer="on\noff"))
    code, out, err = checked(copy, "--engine", engine)
    assert code == VerificationError.exit_code
    assert out.splitlines() == [f"command\texpected 'on\\noff', got {before!r}", "tone\tsame", "whole\tsame"]
    assert err.startswith(f"edgetune-run: 1 of 3 adapters answer differently with {engine}: command; ")
    # The answers of the other format are compared on their own.
    (other,) = {*ENGINES} - {engine}
    assert checked(copy, "--engine", other)[0] == 0


def test_a_text_is_continued_as_it_is(both_of: Callable[[str], Path], checked: Checked, tmp_path: Path) -> None:
    copy = with_golden(both_of("llama"), tmp_path / "home", ("gguf",), "the light in the")
    with Runtime.open(copy, disk_mb=0) as runtime:
        raw = runtime.generate("the light in the", adapter="command", raw=True, max_tokens=8).text
        assert raw != runtime.generate("the light in the", adapter="command", max_tokens=8).text
    assert read_manifest(copy).adapters["command"].golden["gguf"].answer == raw
    assert checked(copy)[0] == 0


def test_the_label_of_an_encoder_is_compared(encoder_bundle: Path, checked: Checked, tmp_path: Path) -> None:
    copy = with_golden(encoder_bundle, tmp_path / "home", ("onnx",))
    label = read_manifest(copy).adapters["power"].golden["onnx"].answer
    assert checked(copy) == (0, "place\tsame\npower\tsame\n", "")
    other = "on" if label == "off" else "off"
    change_manifest(copy, lambda raw: entry_of(raw, "power")["golden"]["onnx"].update(answer=other))
    code, out, _ = checked(copy)
    assert (code, out) == (4, f"place\tsame\npower\texpected {other!r}, got {label!r}\n")


def test_a_golden_prompt_that_does_not_fit_is_an_error_that_names_the_adapter(
    golden: Path, checked: Checked, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(golden, tmp_path / "home"))
    long = [{"role": "user", "content": "light " * 2000}]
    change_manifest(copy, lambda raw: entry_of(raw, "tone")["golden"]["gguf"].update(prompt=long))
    code, out, err = checked(copy, "--engine", "gguf")
    assert (code, out) == (2, "command\tsame\n")
    assert err.startswith("edgetune-run: the golden prompt of adapter 'tone': ")


def test_a_bundle_without_golden_answers_is_reported_as_one(bundle: Path, checked: Checked) -> None:
    code, out, err = checked(bundle)
    assert (code, out.splitlines()[0]) == (3, "command\tno golden answer")
    assert err.startswith("edgetune-run: the files are intact, but bundle 'home' has no golden answer for gguf; build")
    code, told, _ = checked(bundle, "--json")
    assert (code, told) == (3, {"command": None, "tone": None, "whole": None})


def test_damaged_files_are_found_before_anything_is_asked(golden: Path, checked: Checked, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden, tmp_path / "home"))
    file = copy / "adapters/tone/adapter.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, out, err = checked(copy)
    assert (code, out) == (4, "")
    assert "adapters/tone/adapter.gguf does not match its digest" in err


@pytest.mark.parametrize(
    "value", [[], {"gguf": "a"}, {"gguf": {"prompt": "a"}}, {"gguf": {"prompt": 3, "answer": "", "max_tokens": 1}}]
)
def test_a_golden_answer_of_another_form_is_refused(home: Path, value: object) -> None:
    change_manifest(home, lambda raw: entry_of(raw, "command").update(golden=value))
    with pytest.raises(VerificationError, match="is not a manifest"):
        read_manifest(home)
