from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_devices import boards
from edgetune_devices.needs import needs_of_header
from edgetune_export.architectures.shape import BaseShape
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from edgetune_runtime.sizing.calibration import write_calibration
from edgetune_runtime.sizing.figures import SpeedFigures
from recipes import adapter_of, make_recipe, write_recipe
from runtime.bundles import Adapter, low_rank, write_bundle
from typer.testing import CliRunner

from edgetune.bases import BaseSource
from edgetune.cli.devices import app
from edgetune.planning.adapters import plan_adapters
from edgetune.planning.board import choose_settings
from edgetune.planning.on_device import bundle_needs
from edgetune.planning.records import AdapterPlan, BuildPlan
from edgetune.recipe.model import Recipe
from edgetune.recipe.targets import shapes_of


def _run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, EdgetuneError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_names_all_boards() -> None:
    assert [board["name"] for board in json.loads(_run("list", "--json"))] == boards.names()
    assert [line.split()[0] for line in _run("list").splitlines()] == boards.names()


def test_show_gives_every_figure_and_its_source() -> None:
    board = boards.load("pi-5")
    shown = json.loads(_run("show", "pi-5", "--json"))
    assert shown["bandwidth_gb_per_s"] == board.bandwidth_gb_per_s
    assert shown["sources"] == board.sources
    text = _run("show", "pi-5")
    assert all(source in text for source in board.sources.values())


def test_a_board_file_cannot_control_the_terminal(tmp_path: Path) -> None:
    text = (boards.FOLDER / "pi-5.toml").read_text(encoding="utf-8")
    path = tmp_path / "own.toml"
    path.write_text(text.replace('title = "', 'title = "\\u001b]0;title\\u0007\\u009b2J', 1), encoding="utf-8")
    shown = _run("show", path)
    assert "title" in shown and all(line.isprintable() for line in shown.splitlines())


def test_show_takes_another_size_of_memory() -> None:
    assert json.loads(_run("show", "pi-4", "--ram-mib", "8192", "--json"))["ram_mib"] == 8192


def test_fit_of_a_gguf_file_sums_its_parts(tiny_gguf: Callable[[str], Path]) -> None:
    figures = json.loads(_run("fit", tiny_gguf("llama"), "--device", "pi-4", "--json"))
    assert figures["device"] == "pi-4" and figures["fits"] is True
    assert figures["needed_mb"] == pytest.approx(sum(item["mb"] for item in figures["items"]), abs=0.5)
    assert figures["available_mb"] == pytest.approx(boards.load("pi-4").free_mb, abs=0.05)
    assert figures["decode_tokens_per_s"] > 0
    shorter = json.loads(_run("fit", tiny_gguf("llama"), "--device", "pi-4", "--context-length", "16", "--json"))
    assert shorter["needed_mb"] < figures["needed_mb"]
    assert "keys and values of 512 tokens" in [item["name"] for item in figures["items"]], "the base has no more"


@pytest.mark.parametrize("length", ["1", "513"])
def test_fit_refuses_a_context_that_the_runtime_refuses(
    length: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_gguf("llama")
    for target in (base, write_bundle(tmp_path / "home", base, {"task": Adapter(low_rank(base, seed=1))})):
        with pytest.raises(UsageError, match=f"context_length is {length}; give 2 to 512, the context length that the"):
            _run("fit", target, "--device", "pi-4", "--context-length", length)


@pytest.mark.parametrize("option", ["--cache-mb", "--adapters-mb", "--limit-mb"])
def test_fit_refuses_a_size_that_is_not_finite(option: str, tiny_gguf: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(app, ["fit", str(tiny_gguf("llama")), "--device", "pi-4", option, "inf"])
    assert result.exit_code == 2
    assert "inf is not a finite number" in result.output


def test_fit_for_people_says_whether_it_fits(tiny_gguf: Callable[[str], Path]) -> None:
    lines = [line.rsplit("  ", 1) for line in _run("fit", tiny_gguf("llama"), "--device", "pi-zero-2w").splitlines()]
    assert ["fits", "yes"] in [[label.strip(), value] for label, value in lines]


def test_fit_predicts_from_a_calibration_and_says_when_it_is_of_other_weights(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    path, file = tiny_gguf("llama"), tmp_path / "board.json"
    needs = needs_of_header(read_header(path), context_length=1024)
    write_calibration(file, needs, SpeedFigures(0.001, 0.1, 50.0, 5.0, 0.001), {})
    command = ["fit", str(path), "--device", "pi-4", "--json"]
    slow = CliRunner().invoke(app, [*command, "--calibration", str(file)])
    assert slow.stderr == ""
    assert json.loads(slow.stdout)["decode_tokens_per_s"] < json.loads(_run(*command))["decode_tokens_per_s"]
    file.write_text(file.read_text().replace(f'"{needs.weights}"', '"q4_K"'))
    other = CliRunner().invoke(app, [*command, "--calibration", str(file)])
    assert other.stdout == slow.stdout
    assert f"note: the calibration is of q4_K weights and these are {needs.weights}" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("show", "rpi6"), NotFoundError, "no board 'rpi6'"),
        (("fit", "nowhere", "--device", "pi-4"), NotFoundError, "no bundle, recipe or GGUF file nowhere"),
        (("fit", __file__, "--device", "pi-4"), UsageError, "is not a bundle, recipe or GGUF file"),
        (("fit", ".", "--device", "pi-9"), NotFoundError, "no board 'pi-9'"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(
    arguments: tuple[str, ...], error: type[EdgetuneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        _run(*arguments)


def test_fit_of_a_recipe_on_a_folder_predicts_its_default_quantization(
    tiny_folder: Callable[[str], Path], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder("llama"))
    figures = json.loads(_run("fit", recipe, "--device", "pi-4", "--json"))
    needs = needs_of_header(read_header(tiny_gguf("llama")), context_length=1024, quantization="q8_0")
    weights = next(item["mb"] for item in figures["items"] if item["name"] == "base weights")
    assert weights == pytest.approx(needs.base_bytes / 1e6, abs=0.1)
    with pytest.raises(IncompatibleError, match=r"recipe\.yaml has no target onnx; choose one of: gguf"):
        _run("fit", recipe, "--device", "pi-4", "--engine", "onnx")


def _planned(recipe: Recipe, header: GgufHeader) -> dict[str, AdapterPlan]:
    return plan_adapters(recipe, shapes_of(recipe), _source(header))


def _source(header: GgufHeader) -> BaseSource:
    shape = BaseShape.of_header(header)
    return BaseSource("base", Path("base"), "llama", 512, True, header, shape, shape.linear_modules)


def _needs(recipe: Recipe, header: GgufHeader, quantization: str | None) -> Needs:
    return bundle_needs(recipe, _planned(recipe, header), header, quantization)


def _settings(recipe: Recipe, header: GgufHeader) -> BuildPlan:
    return choose_settings(recipe, _planned(recipe, header), _source(header))


def test_needs_of_a_recipe_follow_its_methods_and_quantization(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    header = read_header(tiny_gguf("llama"))
    rank_4, rank_8 = (
        make_recipe(tmp_path, "base", {"command": adapter_of({"name": "lora", "r": r})}, quantization="q8_0")
        for r in (4, 8)
    )
    small, large = _needs(rank_4, header, "q8_0"), _needs(rank_8, header, None)
    assert large.adapters["command"].file_bytes == 2 * small.adapters["command"].file_bytes
    assert large.base_bytes > small.base_bytes
    merged = _needs(make_recipe(tmp_path, "base", {"command": adapter_of(merged=True)}), header, None)
    assert merged.merged == {"command": merged.base_bytes} and not merged.adapters
    # A method that can be trained on the base's grid keeps its types, others have 8 bits.
    coarse = {
        method: _needs(make_recipe(tmp_path, "base", {"command": adapter_of(method, merged=True)}), header, "q4_0")
        for method in ("lora", "dora")
    }
    assert coarse["lora"].merged["command"] == coarse["lora"].base_bytes
    assert coarse["dora"].merged["command"] > 1.3 * coarse["dora"].base_bytes


def test_a_board_chooses_only_what_the_recipe_leaves_unset(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    header = read_header(tiny_gguf("llama"))
    assert _settings(make_recipe(tmp_path, "base"), header).board is None
    free = _settings(make_recipe(tmp_path, "base", device="pi-4", threads=None), header)
    assert (free.base.quantization, free.recipe.context_length, free.recipe.threads) == ("q8_0", 512, 4)
    written = {"quantization": "q4_0", "context_length": 64, "threads": 2}
    bound = _settings(make_recipe(tmp_path, "base", device="pi-4", **written), header)
    assert (bound.base.quantization, bound.recipe.context_length, bound.recipe.threads) == ("q4_0", 64, 2)


def test_a_recipe_that_cannot_fit_is_refused(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "base", device="pi-zero-2w", context_length=2_000_000)
    with pytest.raises(IncompatibleError, match=r"pi-zero-2w leaves 305 MB; .*; set context_length to"):
        _settings(recipe, read_header(tiny_gguf("llama")))
