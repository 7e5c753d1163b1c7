from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, read_manifest
from edgetune_runtime.cli import main
from edgetune_runtime.inference.measuring import loaded_bundle
from recipes import adapter_of, make_recipe
from runtime.bundles import change_manifest
from trainings import QUIET

from edgetune.building.pipeline import build
from edgetune.shipping.golden import MAX_TOKENS

QUESTIONS = [f"turn on the light {number}" for number in range(10)]
SECRET = "nobody else reads the number"
COLORS = ("red", "warm", "blue")
TOOL = {"name": "turn", "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}}}
CALL = {"type": "function", "function": {"name": "turn", "arguments": {"on": True}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "command": [{"prompt": text, "completion": {"set": "red", "to": n}} for n, text in enumerate(QUESTIONS)],
    "color": [{"text": text, "label": COLORS[n % 3]} for n, text in enumerate(QUESTIONS)],
    "text": [{"text": f"{text} and the blind of the hall"} for text in QUESTIONS],
    "call": [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [CALL]}],
            "tools": [{"type": "function", "function": TOOL}],
        }
        for text in QUESTIONS
    ],
    "whole": [{"prompt": text, "completion": "close the blind"} for text in QUESTIONS],
    "quiet": [{"prompt": f"{SECRET} {number}", "completion": "stop"} for number in range(10)],
}
MORE: dict[str, dict[str, Any]] = {
    "command": {"system": "play", "output": "auto"},
    "whole": {"merged": True},
    "quiet": {"golden": False},
}


@pytest.fixture(scope="module")
def bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in both formats with an adapter per form of rows, one of them merged and one without golden answers."""
    folder = tmp_path_factory.mktemp("golden")
    method = {"name": "lora", "r": 2, "lora_alpha": 32}
    adapters = {
        name: adapter_of(method, train=f"{name}.jsonl", held_out=0.3, draft=False, **MORE.get(name, {}))
        for name in ROWS
    }
    data = {f"{name}.jsonl": rows for name, rows in ROWS.items()}
    keys = {"targets": ["gguf", "onnx"], "training": {"evals": 1}, "states": "start"}
    recipe = make_recipe(folder, tiny_gguf("llama"), adapters, data=data, **keys)
    return build(recipe, folder / "home", progress=QUIET).bundle


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_a_new_bundle_answers_as_its_build_did(engine: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(bundle), "--engine", engine]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [[name, "no golden answer" if name == "quiet" else "same"] for name in ROWS]


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_an_answer_is_to_a_validation_row_of_the_adapter(engine: str, manifest: Manifest) -> None:
    golden = {name: entry.golden[engine] for name, entry in manifest.adapters.items() if name != "quiet"}
    for name in ("command", "color", "call", "whole"):
        (message,) = golden[name].prompt
        assert isinstance(message, dict)
        assert (message["role"], message["content"] in QUESTIONS) == ("user", True)
    assert str(golden["text"].prompt).startswith("turn on the light")
    assert golden["color"].answer in COLORS
    assert golden["command"].answer.startswith('{"set": "red", "to": ')
    assert golden["call"].tools is not None
    assert golden["call"].tools[0]["function"]["name"] == "turn"
    assert all(item.answer and item.max_tokens == MAX_TOKENS for item in golden.values())


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
@pytest.mark.parametrize("name", ["whole", "text"])
def test_the_margin_is_the_smallest_lead_of_a_token_and_the_row_has_the_largest(
    name: str, engine: str, bundle: Path, manifest: Manifest
) -> None:
    golden = manifest.adapters[name].golden[engine]
    with Runtime.open(bundle, engine=engine, contexts=1, cache_mb=0, disk_mb=0) as runtime:
        assert golden.margin == pytest.approx(smallest_lead(runtime, name, golden.prompt), abs=2e-3)
        prompts = [row["text"][:80] if name == "text" else row["prompt"] for row in ROWS[name]]
        leads = sorted(smallest_lead(runtime, name, prompt, raw=name == "text") for prompt in prompts)
    # Three rows are held out, so the best of them is at least the third of all.
    assert golden.margin >= leads[2] - 2e-3


def smallest_lead(runtime: Runtime, name: str, prompt: Any, *, raw: bool | None = None) -> float:  # noqa: ANN401
    """Greedy decoding, token by token: how close the second token ever came, in nats."""
    call = loaded_bundle(runtime).call(prompt, name, raw=isinstance(prompt, str) if raw is None else raw)
    smallest = math.inf
    with call.lease() as context:
        logits = context.run(call.job).logits
        for _ in range(MAX_TOKENS):
            token = int(logits.argmax())
            second, best = sorted(logits.tolist())[-2:]
            smallest = min(smallest, best - second)
            if context.engine.tokenizer.is_end(token):
                break
            (logits,) = context.extend([token])
    return smallest


def test_golden_false_keeps_the_rows_out_of_the_manifest(bundle: Path, manifest: Manifest) -> None:
    assert manifest.adapters["quiet"].golden == {}
    assert SECRET not in (bundle / "manifest.json").read_text(encoding="utf-8")
    assert "turn on the light" in (bundle / "manifest.json").read_text(encoding="utf-8")


def test_rows_for_the_golden_answer_may_be_longer_than_those_of_the_parity_check(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    # Two rows are held out, and longer ones are made that are out of scope.
    rows = [{"text": f"turn {number}", "label": ("off", "on")[number % 2]} for number in range(20)]
    options: dict[str, Any] = {"held_out": 0.1, "draft": False, "confidence": False, "out_of_scope": True}
    adapters = {"color": adapter_of(train="rows.jsonl", **options)}
    keys = {"training": {"max_steps": 1, "evals": 1}}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, data={"rows.jsonl": rows}, **keys)
    golden = read_manifest(build(recipe, tmp_path / "home", progress=QUIET).bundle).adapters["color"].golden
    assert golden["gguf"].answer


def test_states_start_has_a_server_compute_them(manifest: Manifest) -> None:
    assert manifest.warms
    assert not [name for name in manifest.files if name.startswith("states/")]


def test_check_finds_an_adapter_that_was_swapped_for_another(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "home"))
    # All digests are right.
    change_manifest(copy, lambda raw: raw["adapters"]["whole"]["files"].update(gguf=raw["base"]["files"]["gguf"]))
    assert main(["check", str(copy), "--json"]) == 4
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert [name for name, item in told.items() if item and not item["same"]] == ["whole"]
    assert told["quiet"] is None
    assert "1 of 6 adapters answer differently with gguf: whole" in err
