"""The kits of a deploy: one for each kind of board and Python, cached without the bundle's own files."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

from edgetune_devices import boards
from edgetune_runtime import __version__
from edgetune_runtime.bundle import MANIFEST_NAME, read_manifest, sha256_of, verify_files
from edgetune_runtime.errors import EdgetuneError

from edgetune.delivery.board.kit import BUNDLE_FOLDER, PROGRAM_NAME, WHEELS_FOLDER, Kit, KitFile, read_kit
from edgetune.delivery.board.opening import DEFAULTS, Opening
from edgetune.delivery.board.store import check_file
from edgetune.delivery.kit.program import board_program
from edgetune.delivery.kit.runtime_wheel import runtime_wheel
from edgetune.digests import key_of

MakeKit = Callable[[str, str, Path, Sequence[Path]], object]
"""Writes the kit of a bundle for a board and a Python version, such as 3.13, to a folder; the last argument are wheels
of an earlier kit that fit this one."""
_KEPT = 8
"""Kits in the cache, of up to 60 MB."""


@dataclass(frozen=True)
class MadeKit:
    """A kit in `folder`, except the bundle's files, which are in `bundle`."""

    kit: Kit
    folder: Path
    bundle: Path

    @property
    def program(self) -> KitFile:
        """The board program."""
        return next(file for file in self.kit.files if file.path == PROGRAM_NAME)

    def path_of(self, file: KitFile) -> Path:
        """Where a file of the kit is on this machine."""
        within = file.path.removeprefix(f"{BUNDLE_FOLDER}/")
        return self.folder / file.path if within == file.path else self.bundle / within


class Kits:
    """The kits of one bundle, in the folder `cache`.

    `engine` and `opening`, with which `make` makes them, are part of what a cached kit is found by.
    Compares the bundle's files with their digests first, and raises what `read_manifest` and `verify_files` raise.
    """

    def __init__(
        self, bundle: Path, engine: str | None, make: MakeKit, cache: Path, opening: Opening = DEFAULTS
    ) -> None:
        verify_files(bundle, read_manifest(bundle))
        self._bundle, self._engine, self._make, self._cache = bundle, engine, make, cache
        self._opening = opening
        self._made: dict[tuple[str, str], MadeKit] = {}
        self._lock = threading.Lock()

    def kit_for(self, board: str, python: str) -> MadeKit:
        """The kit for a board and its Python; raises what making it raises."""
        with self._lock:
            if (board, python) not in self._made:
                self._made[board, python] = self._cached_or_made(board, python)
            return self._made[board, python]

    def _cached_or_made(self, board: str, python: str) -> MadeKit:
        """Kits have the digest of all that their wheels depend on in their name, then that of all else."""
        # Wheels have the versions that are installed here.
        installed = sorted((item.name, item.version) for item in distributions() if item.name is not None)
        wheels = key_of([__version__, self._engine, board, python, installed])[:16]
        code = [board_program().hex(), runtime_wheel()[1].hex()]
        others = key_of(
            [sha256_of(self._bundle / MANIFEST_NAME), asdict(boards.find(board)), self._opening.given, *code]
        )[:16]
        folder = self._cache / f"{wheels}-{others}"
        kit = _cached(folder)
        if kit is None:
            earlier = (path for path in self._cache.glob(f"{wheels}-*") if _cached(path) is not None)
            found = [sorted(path.glob(f"{WHEELS_FOLDER}/*.whl")) for path in earlier]
            kit = self._make_into(folder, board, python, found[0] if found else [])
        os.utime(folder)
        return MadeKit(kit, folder, self._bundle)

    def _make_into(self, folder: Path, board: str, python: str, wheels: Sequence[Path]) -> Kit:
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=".") as temporary:
            made = Path(temporary, "kit")
            self._make(board, python, made, wheels)
            kit = read_kit(made)
            shutil.rmtree(made / BUNDLE_FOLDER)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        in_use = {made.folder for made in self._made.values()} | {folder}
        kits = sorted(set(self._cache.glob("[!.]*")) - in_use, key=lambda path: path.stat().st_mtime, reverse=True)
        for old in kits[max(0, _KEPT - len(in_use)) :]:
            shutil.rmtree(old, ignore_errors=True)
        return kit


def _cached(folder: Path) -> Kit | None:
    """The kit in `folder`; None if it is missing or damaged."""
    try:
        kit = read_kit(folder)
        for file in kit.files:
            if not file.path.startswith(f"{BUNDLE_FOLDER}/"):
                check_file(folder / file.path, file)
    except EdgetuneError:
        return None
    return kit
