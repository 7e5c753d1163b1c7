"""Name of a board in, its figures out: cores, memory and speed, each with its source. Standard library only.

A board is one file, `boards/NAME.toml`; adding a board is adding a file.
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
    """One board. Memory is in MiB, as `free -m` counts it; a GB is 10^9 bytes.

    `ram_free_mib` is what an idle system leaves. `bandwidth_gb_per_s` is what decoding sustains, not what the memory's
    data sheet says. `compute_gflop_per_s` counts a multiplication and an addition as two. `layer_us` is what a layer
    costs beside reading its weights; `adapter_module_us` is what one adapted module adds to a token.
    `sources` says for each figure where it comes from.
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
        """What an idle system leaves, in MB (10^6 bytes)."""
        return self.ram_free_mib * 2**20 / 1e6

    def with_ram(self, ram_mib: int) -> Board:
        """The same board with another size of memory; the system is taken to need as much as at the size in the file.

        UsageError when the system would not fit.
        """
        system_mib = self.ram_mib - self.ram_free_mib
        if ram_mib <= system_mib:
            remedy = f"give more than the {system_mib} MiB that the system of {self.name} takes"
            raise UsageError(f"a {self.name} with {ram_mib} MiB of RAM has nothing left for a model", remedy)
        return replace(self, ram_mib=ram_mib, ram_free_mib=ram_mib - system_mib)


def names() -> list[str]:
    """The boards there are, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Board:
    """The board called `name`; NotFoundError names those there are and the nearest of them."""
    known = names()
    if name not in known:
        near = nearest(name, known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise NotFoundError(f"no board {name!r}{hint}", f"choose one of: {', '.join(known)}")
    return read(FOLDER / f"{name}.toml")


def read(path: Path) -> Board:
    """The board of a file; UsageError with all that is wrong in it."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"no board file {path}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} is not TOML: {error}", "correct the file") from error
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
        return [*problems, "sources is not a table of texts"]
    problems += [f"sources.{key} is missing" for key in ("instruction_sets", *_NUMBERS) if key not in sources]
    if not problems and raw["ram_free_mib"] >= raw["ram_mib"]:
        problems.append(f"ram_free_mib is {raw['ram_free_mib']}, not less than ram_mib {raw['ram_mib']}")
    return problems


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
