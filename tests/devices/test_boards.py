from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from edgetune_devices import boards
from edgetune_runtime.errors import NotFoundError, UsageError


@pytest.mark.parametrize("name", boards.names_with_sizes())
def test_each_board_loads_and_gives_a_source_for_every_figure(name: str) -> None:
    board = boards.load(name)
    assert board.name == name
    assert board.ram_free_mib < board.ram_mib
    assert set(board.sources) >= {"cores", "ram_free_mib", "bandwidth_gb_per_s", "compute_gflop_per_s", "layer_us"}
    assert re.search(r"https://\S+\.\S+/", board.sources["bandwidth_gb_per_s"] + board.sources["cores"])


def test_a_processor_with_dot_products_or_avx2_repacks() -> None:
    repacking = {name for name in boards.names() if "q4_0" in boards.load(name).repacks}
    assert set(boards.names()) - repacking == {"pi-zero-2w", "pi-3b-plus", "pi-4"}
    assert "q8_0" in boards.load("pi-5").repacks
    assert "q8_0" not in boards.load("laptop").repacks


def test_a_better_board_is_faster_and_leaves_more_memory() -> None:
    order = [boards.load(name) for name in ("pi-zero-2w", "pi-4", "pi-5", "laptop")]
    for slower, faster in itertools.pairwise(order):
        assert slower.bandwidth_gb_per_s < faster.bandwidth_gb_per_s
        assert slower.compute_gflop_per_s < faster.compute_gflop_per_s
        assert slower.ram_free_mib < faster.ram_free_mib
        assert slower.layer_us > faster.layer_us


def test_the_error_about_an_unknown_board_names_the_nearest_and_lists_all() -> None:
    with pytest.raises(NotFoundError, match=r"no board 'pi5' \(did you mean 'pi-5'\?\); choose one of: .*pi-4, pi-5"):
        boards.load("pi5")
    with pytest.raises(NotFoundError, match=r"no board 'pi-4-3gb' \(did you mean 'pi-4-.gb'\?\)"):
        boards.load("pi-4-3gb")


@pytest.mark.parametrize("name", ["pi-zero", "pi-zero-w", "raspberry-pi-2", "pi-1"])
def test_a_32_bit_board_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(NotFoundError, match="only 64-bit boards are supported"):
        boards.load(name)


@pytest.mark.parametrize(
    "name",
    [
        "pi-zero-2",
        "pi-zero-2-w",
        "pi-zero2w",
        "pi-zero-w-2",
        "Pi-Zero-2W",
        "raspberry-pi-zero-2-w",
        "raspberrypi-zero-2",
    ],
)
def test_a_name_like_that_of_the_zero_2_w_is_not_taken_for_a_32_bit_board(name: str) -> None:
    with pytest.raises(NotFoundError, match=rf"no board {name!r} \(did you mean 'pi-zero-2w'\?\)"):
        boards.load(name)


def test_the_vendors_name_does_not_hide_the_most_similar_board() -> None:
    with pytest.raises(NotFoundError, match=r"did you mean 'pi-4'\?"):
        boards.load("raspberry-pi-4b")


def test_a_board_is_found_by_name_or_by_file(tmp_path: Path) -> None:
    assert boards.find("pi-4-1gb") == boards.load("pi-4-1gb")
    assert boards.find(str(_file(tmp_path))).name == "mine"
    with pytest.raises(NotFoundError, match=r"no board file nowhere\.toml"):
        boards.find("nowhere.toml")


def test_a_size_of_memory_is_a_board_of_its_own() -> None:
    small, board = boards.load("pi-4-2gb"), boards.load("pi-4")
    assert (small.name, small.title, small.family) == ("pi-4-2gb", "Raspberry Pi 4 Model B, 2 GB", "pi-4")
    assert small.ram_mib - small.ram_free_mib == board.ram_mib - board.ram_free_mib
    assert boards.load("pi-4-4gb").ram_free_mib == board.ram_free_mib
    assert {"pi-4-8gb", "pi-5-2gb", "pi-5-16gb", "orange-pi-5-16gb"} <= set(boards.names_with_sizes())


def test_a_size_may_leave_other_memory_free_than_the_difference_says() -> None:
    board = boards.load("pi-4")
    assert board.ram_mib - board.ram_free_mib > 400
    assert boards.load("pi-4-1gb").ram_free_mib == board.with_ram(1024).ram_free_mib == 720


def test_a_path_is_not_taken_for_a_board() -> None:
    with pytest.raises(NotFoundError, match="no board"):
        boards.load("../boards/pi-5")


def test_with_ram_keeps_what_the_system_takes() -> None:
    board = boards.load("pi-4")
    bigger = board.with_ram(8192)
    assert bigger.ram_mib - bigger.ram_free_mib == board.ram_mib - board.ram_free_mib
    assert bigger.bandwidth_gb_per_s == board.bandwidth_gb_per_s
    with pytest.raises(UsageError, match="128 MiB of RAM has nothing left"):
        board.with_ram(128)


def _file(folder: Path, **changes: str) -> Path:
    text = (boards.FOLDER / "pi-5.toml").read_text(encoding="utf-8")
    for key, line in changes.items():
        text = re.sub(rf"^{key} = .*\n", f"{line}\n", text, count=1, flags=re.MULTILINE)
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_copied_board_file_is_a_board(tmp_path: Path) -> None:
    board = boards.read(_file(tmp_path, ram_mib="ram_mib = 16384", ram_free_mib="ram_free_mib = 15500"))
    assert (board.name, board.ram_mib, board.ram_free_mib) == ("mine", 16384, 15500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cores": "core = 4"}, r"mine.toml: cores is missing; unknown key 'core' \(did you mean 'cores'\?\)"),
        ({"cores": "cores = 0"}, "cores is 0, not a positive number"),
        ({"layer_us": "layer_us = inf"}, r"layer_us is inf, not a positive number of at most 1e\+12"),
        ({"cores": "cores = true", "ram_mib": 'ram_mib = "8"'}, "cores is True.*; ram_mib is '8', not a positive"),
        ({"ram_free_mib": "ram_free_mib = 9000"}, "ram_free_mib is 9000, not less than ram_mib 8192"),
        ({"instruction_sets": 'instruction_sets = "neon"'}, "instruction_sets is not a list of names"),
        ({"cores": 'cores = 4\nsystem = "mac"'}, "system is 'mac', not one of: linux, macos"),
        ({"model_pattern": 'model_pattern = "Pi ("'}, r"model_pattern is 'Pi \(', not a regular expression"),
        ({"title": "title = "}, "mine.toml is not valid TOML"),
        ({"ram_sizes_mib": "ram_sizes_mib = 1024"}, "ram_sizes_mib is not a list of multiples of 1024"),
        ({"ram_sizes_mib": "ram_free_by_size_mib = 720"}, "ram_free_by_size_mib does not give fewer MiB"),
        (
            {"cores": "cores = 4\nram_free_by_size_mib = { 2048 = 3000 }"},
            "ram_free_by_size_mib does not give fewer MiB",
        ),
        ({"ram_sizes_mib": "ram_sizes_mib = [1000]"}, "ram_sizes_mib is not a list of multiples of 1024"),
    ],
)
def test_a_wrong_board_file_is_refused_with_all_that_is_wrong(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        boards.read(_file(tmp_path, **changes))


def test_a_figure_without_a_source_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path)
    text = path.read_text(encoding="utf-8")
    table = text.index("[sources]")
    path.write_text(text[:table] + re.sub(r"^cores = .*\n", "", text[table:], flags=re.MULTILINE), encoding="utf-8")
    with pytest.raises(UsageError, match=r"sources\.cores is missing"):
        boards.read(path)


def test_boards_need_only_the_standard_library() -> None:
    code = "import sys; from edgetune_devices import boards; boards.load('pi-4'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"numpy", "llama_cpp", "torch", "pydantic", "jinja2"} & set(loaded)
