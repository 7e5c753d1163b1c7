"""Read boards: cores, memory and speed, each with its source. Standard library only.

A board is one file, `boards/NAME.toml`; to add a board, add a file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.wording import nearest

FOLDER = Path(__file__).parent / "boards"


@dataclass(frozen=True)
class Board:
    """One board. Memory is in MiB, as in `free -m`; a GB is 10^9 bytes.

    `ram_free_mib` is the free memory of an idle system. `bandwidth_gb_per_s` is the memory bandwidth that decoding
    sustains, not the one in the data sheet. `compute_gflop_per_s` counts a multiply-add as two operations. `layer_us`
    is the time of a layer per token in addition to reading its weights; `adapter_module_us` is the time per token that
    one adapted module adds. `sources` has the source of each figure.
    """

    name: str
    title: str
    cores: int
    instruction_sets: tuple[str, ...]
    ram_mib: int
    ram_free_mib: int
    bandwidth_gb_per_s: float
    compute_gflop_per_s: float
    layer_us: float
    adapter_module_us: float
    storage: str
    sources: Mapping[str, str]

    @property
    def free_mb(self) -> float:
        """The free memory of an idle system, in MB (10^6 bytes)."""
        return self.ram_free_mib * 2**20 / 1e6

    def with_ram(self, ram_mib: int) -> Board:
        """The same board with another amount of memory, of which the system needs as much as in the board's file.

        UsageError when the system would not fit.
        """
        system_mib = self.ram_mib - self.ram_free_mib
        if ram_mib <= system_mib:
            remedy = f"give more than the {system_mib} MiB that the system of {self.name} uses"
            raise UsageError(f"a {self.name} with {ram_mib} MiB of RAM has nothing left for a model", remedy)
        return replace(self, ram_mib=ram_mib, ram_free_mib=ram_mib - system_mib)


def names() -> list[str]:
    """The names of all boards, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Board:
    """The board called `name`; NotFoundError suggests the most similar name and lists all boards."""
    known = names()
    if name not in known:
        near = nearest(name, known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise NotFoundError(f"no board {name!r}{hint}", f"choose one of: {', '.join(known)}")
    return read(FOLDER / f"{name}.toml")


def read(path: Path) -> Board:
    """Read a board file; UsageError lists all its problems."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"no board file {path}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} is not valid TOML: {error}", "correct the file") from error
    problems = _problems(raw)
    if problems:
        raise UsageError(f"{path.name}: {'; '.join(problems)}", "see docs/boards.md")
    return Board(name=path.stem, **{**raw, "instruction_sets": tuple(raw["instruction_sets"])})


_NUMBERS = (
    "cores",
    "ram_mib",
    "ram_free_mib",
    "bandwidth_gb_per_s",
    "compute_gflop_per_s",
    "layer_us",
    "adapter_module_us",
)


def _problems(raw: Mapping[str, Any]) -> list[str]:
    wanted = {f.name for f in fields(Board)} - {"name"}
    problems = [f"{key} is missing" for key in sorted(wanted - raw.keys())]
    for key in sorted(raw.keys() - wanted):
        near = nearest(key, wanted)
        problems.append(f"unknown key {key!r}" + (f" (did you mean {near!r}?)" if near else ""))
    if problems:
        return problems
    problems += [f"{key} is {raw[key]!r}, not a positive number" for key in _NUMBERS if not _is_positive(raw[key])]
    problems += [f"{key} is not text" for key in ("title", "storage") if not isinstance(raw[key], str)]
    sets, sources = raw["instruction_sets"], raw["sources"]
    if not isinstance(sets, list) or not all(isinstance(name, str) for name in sets):
        problems.append("instruction_sets is not a list of names")
    if not isinstance(sources, dict) or not all(isinstance(text, str) and text for text in sources.values()):
        return [*problems, "sources is not a table of strings"]
    problems += [f"sources.{key} is missing" for key in ("instruction_sets", *_NUMBERS) if key not in sources]
    if not problems and raw["ram_free_mib"] >= raw["ram_mib"]:
        problems.append(f"ram_free_mib is {raw['ram_free_mib']}, not less than ram_mib {raw['ram_mib']}")
    return problems


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
