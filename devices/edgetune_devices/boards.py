"""Reads boards: cores, memory and speed, each with its source. Standard library only.

A board is one file, `boards/NAME.toml`; to add a board, add a file. A board that is sold with several sizes of memory
lists them, and `NAME-4gb` is the one with 4 GiB.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.formats.quantization import repacked_types
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.wording import nearest

FOLDER = Path(__file__).parent / "boards"
_SIZED = re.compile(r"(?P<name>.+)-(?P<gib>\d+)gb")
_VENDOR = re.compile(r"raspberry-?(?=pi)")
# Not the Zero 2 W, however it is written.
_SIMILAR_32_BIT = re.compile(r"pi-?(zero(?!-?(w-?)?2)(-?w)?|1|2)(-.*)?")
SYSTEMS = ("linux", "macos")


@dataclass(frozen=True)
class Board:
    """One board. Memory is in MiB, as in `free -m`; a GB is 10^9 bytes.

    `ram_free_mib` is the free memory of an idle system. `bandwidth_gb_per_s` is the memory bandwidth that decoding
    sustains, not the one in the data sheet. `compute_gflop_per_s` counts a multiply-add as two operations. `layer_us`
    is the time of a layer per token in addition to reading its weights; `adapter_module_us` is the time per token that
    one adapted module adds. `sources` has the source of each figure. `ram_sizes_mib` are the sizes that the board is
    sold with, if there are several; `ram_free_by_size_mib` has the free memory of those whose system needs another
    amount than that of this one. `kv_gb_per_s` is the rate at which attention reads keys and values, by default the
    memory's. `system` is one of `SYSTEMS`. `model_pattern` is a regular expression that is found in the name in
    /proc/device-tree/model; without one, the board is not recognized.
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
    ram_sizes_mib: tuple[int, ...] = ()
    ram_free_by_size_mib: Mapping[int, int] = field(default_factory=dict)
    kv_gb_per_s: float | None = None
    system: str = "linux"
    model_pattern: str = ""

    @property
    def free_mb(self) -> float:
        """The free memory of an idle system, in MB (10^6 bytes)."""
        return self.ram_free_mib * 2**20 / 1e6

    @property
    def family(self) -> str:
        """The name of the board without the size of its memory."""
        sized = _SIZED.fullmatch(self.name)
        return sized["name"] if sized else self.name

    @property
    def speed(self) -> SpeedFigures:
        """The figures that determine the speed."""
        bandwidth = self.bandwidth_gb_per_s
        kv = self.kv_gb_per_s or bandwidth
        return SpeedFigures(bandwidth, self.compute_gflop_per_s, self.layer_us, self.adapter_module_us, kv)

    @property
    def repacks(self) -> frozenset[str]:
        """The types of weights that llama.cpp can repack on the board's processor, for which it has faster code."""
        return repacked_types(self.instruction_sets)

    def with_ram(self, ram_mib: int) -> Board:
        """The same board with another amount of memory.

        The system needs as much as in the board's file, unless that gives another figure for this amount. UsageError
        when the system would not fit.
        """
        if ram_mib in self.ram_free_by_size_mib:
            return replace(self, ram_mib=ram_mib, ram_free_mib=self.ram_free_by_size_mib[ram_mib])
        system_mib = self.ram_mib - self.ram_free_mib
        if ram_mib <= system_mib:
            remedy = f"give more than the {system_mib} MiB that the system of {self.name} uses"
            raise UsageError(f"a {self.name} with {ram_mib} MiB of RAM has nothing left for a model", remedy)
        return replace(self, ram_mib=ram_mib, ram_free_mib=ram_mib - system_mib)

    def limited(self, limit_mb: float) -> Board:
        """The same board for a process that may use at most so many MB (10^6 bytes), as in a container or a unit."""
        return replace(self, ram_free_mib=min(self.ram_free_mib, int(limit_mb * 1e6 / 2**20)))

    def sizes(self) -> list[Board]:
        """The board of a file with each size of memory that it is sold with, called like pi-4-2gb."""
        system_mib = self.ram_mib - self.ram_free_mib
        usable = (size for size in self.ram_sizes_mib if size > system_mib or size in self.ram_free_by_size_mib)
        return [self._with_size(size) for size in usable]

    def _with_size(self, ram_mib: int) -> Board:
        title, _, rest = self.title.partition(f"{self.ram_mib // 1024} GB")
        name, title = f"{self.family}-{ram_mib // 1024}gb", f"{title}{ram_mib // 1024} GB{rest}"
        return replace(self.with_ram(ram_mib), name=name, title=title)


def names() -> list[str]:
    """The names of all boards, sorted, without the other sizes of memory."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def names_with_sizes() -> list[str]:
    """The names of all boards, each followed by those of its sizes of memory, such as pi-4-2gb."""
    return [name for board in map(load, names()) for name in (board.name, *(size.name for size in board.sizes()))]


def load(name: str) -> Board:
    """The board called `name`, or a size of it (`pi-4-2gb`); NotFoundError suggests the most similar name."""
    if name in names():
        return read(FOLDER / f"{name}.toml")
    sized = _SIZED.fullmatch(name)
    if sized and sized["name"] in names():
        board = next((size for size in load(sized["name"]).sizes() if size.name == name), None)
        if board is not None:
            return board
    sizes = "; boards with several sizes of memory are also called like pi-4-2gb"
    raise NotFoundError(f"no board {name!r}{_hint(name)}", f"choose one of: {', '.join(names())}{sizes}")


def find(name: str) -> Board:
    """The board of the file `name` if it ends in .toml, and otherwise the one called `name`; as `read` and `load`."""
    return read(Path(name)) if name.endswith(".toml") else load(name)


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
    lists: dict[str, Any] = {key: tuple(raw[key]) for key in ("instruction_sets", "ram_sizes_mib") if key in raw}
    free = {int(size): mib for size, mib in raw.get("ram_free_by_size_mib", {}).items()}
    return Board(name=path.stem, **{**raw, **lists, "ram_free_by_size_mib": free})


def _hint(name: str) -> str:
    short = _VENDOR.sub("", name.lower())
    if _SIMILAR_32_BIT.fullmatch(short):
        return " (only 64-bit boards are supported, and the first Pi boards have 32-bit processors)"
    near = nearest(short, names_with_sizes())
    return f" (did you mean {near!r}?)" if near else ""


_MOST = 1e12
"""More than any board has of anything."""
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
    keys = {f.name for f in fields(Board)} - {"name"}
    required = {f.name for f in fields(Board) if f.default is f.default_factory is MISSING} - {"name"}
    problems = [f"{key} is missing" for key in sorted(required - raw.keys())]
    for key in sorted(raw.keys() - keys):
        near = nearest(key, keys)
        problems.append(f"unknown key {key!r}" + (f" (did you mean {near!r}?)" if near else ""))
    if problems:
        return problems
    numbers = [*_NUMBERS, *(key for key in ("kv_gb_per_s",) if key in raw)]
    wrong = [key for key in numbers if not _is_positive(raw[key])]
    problems += [f"{key} is {raw[key]!r}, not a positive number of at most {_MOST:g}" for key in wrong]
    problems += [f"{key} is not text" for key in ("title", "storage") if not isinstance(raw[key], str)]
    if raw.get("system", SYSTEMS[0]) not in SYSTEMS:
        problems.append(f"system is {raw['system']!r}, not one of: {', '.join(SYSTEMS)}")
    if not _is_pattern(raw.get("model_pattern", "")):
        problems.append(f"model_pattern is {raw['model_pattern']!r}, not a regular expression")
    sets, sizes, sources = raw["instruction_sets"], raw.get("ram_sizes_mib", []), raw["sources"]
    if not isinstance(sets, list) or not all(isinstance(name, str) for name in sets):
        problems.append("instruction_sets is not a list of names")
    if not isinstance(sizes, list) or not all(_is_positive(size) and size % 1024 == 0 for size in sizes):
        problems.append("ram_sizes_mib is not a list of multiples of 1024")
        sizes = []
    free = raw.get("ram_free_by_size_mib", {})
    free = free if isinstance(free, dict) else {"": free}
    if not all(size in map(str, sizes) and _is_positive(free[size]) and free[size] < int(size) for size in free):
        problems.append("ram_free_by_size_mib does not give fewer MiB for some of ram_sizes_mib")
    if not isinstance(sources, dict) or not all(isinstance(text, str) and text for text in sources.values()):
        return [*problems, "sources is not a table of strings"]
    sourced = ["instruction_sets", *numbers, *(key for key in ("ram_free_by_size_mib",) if key in raw)]
    problems += [f"sources.{key} is missing" for key in sourced if key not in sources]
    if not problems and raw["ram_free_mib"] >= raw["ram_mib"]:
        problems.append(f"ram_free_mib is {raw['ram_free_mib']}, not less than ram_mib {raw['ram_mib']}")
    return problems


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False
