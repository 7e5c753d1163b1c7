"""Makes a kit: everything that a board needs to install and run a bundle without a network."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_devices import boards, fit
from edgetune_runtime import __version__
from edgetune_runtime.bundle import GENERATION, MANIFEST_NAME, Manifest, read_manifest, resolve, verify_files
from edgetune_runtime.engines import gguf
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.sizing.needs import COSTS, SERVER_MB, Needs, needs_of_bundle
from edgetune_runtime.sizing.options import with_options

from edgetune import task_types
from edgetune.delivery.board.kit import (
    BUNDLE_FOLDER,
    KIT_NAME,
    PROGRAM_NAME,
    SCHEMA_VERSION,
    SUMS_NAME,
    WHEELS_FOLDER,
    KitFile,
    parse_kit,
    wheels_id,
)
from edgetune.delivery.board.opening import DEFAULTS, Opening
from edgetune.delivery.wheel import llama_wheel
from edgetune.progress import Progress

from . import output, rehearsal, sbom, wheels
from .platforms import Platform, platform_of
from .program import board_program, install_script
from .runtime_wheel import runtime_wheel

_PORT = 8080
_HEADROOM = 1.25
"""The unit's memory limit in relation to the prediction: the kernel ends a process that exceeds it."""


@dataclass(frozen=True)
class KitResult:
    """A kit that was written; sizes in bytes. `version` is its id on the board."""

    path: Path
    version: str
    bytes: int
    bundle_bytes: int
    wheels: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "path": str(self.path)}


def make_kit(
    bundle: Path,
    board: str,
    out: Path,
    *,
    python: str,
    progress: Progress,
    engine: str | None = None,
    opening: Opening = DEFAULTS,
    with_bundle: bool = True,
    wheel: Path | None = None,
    earlier: Sequence[Path] = (),
) -> KitResult:
    """Write the kit of a bundle for a board to `out`, a folder, or a tar file if it ends in .tar.

    `board` is the name of a board or the path of a board file. `python` is the board's Python, a version or "system".
    `engine` is the bundle's first format if None, `opening` how the board opens the bundle. `wheel` is a wheel of
    llama-cpp-python to use instead of building one; `earlier` are wheels of another kit for the same Python and
    machine, which need not be downloaded. Raises NotFoundError for an unknown board, IncompatibleError if the bundle
    does not fit on the board, if the board does not run Linux or `wheel` does not run there, or if there are no wheels
    for its Python, VerificationError if a file of the bundle is damaged or an adapter answers differently with
    `opening`, UnreachableError if wheels cannot be downloaded.
    """
    known = boards.find(board)
    platform = platform_of(known, python)
    if wheel is not None:
        wheels.require_wheel_of(wheels.LLAMA, wheel, platform)
    manifest = read_manifest(bundle)
    chosen = _engine(manifest, engine)
    output.check_destination(out)
    needed_mb, kept_mb = _memory_mb(bundle, manifest, chosen, known, opening=opening, device=board)
    limit_mb = min(math.ceil((needed_mb + SERVER_MB) * _HEADROOM), int(known.free_mb))
    if with_bundle:
        progress.say(f"checking the files of {manifest.name}")
        verify_files(bundle, manifest)
        rehearsal.require_golden(bundle, chosen, opening, progress)
    with tempfile.TemporaryDirectory() as folder:
        own = _own_wheels(platform, Path(folder), engine=chosen, wheel=wheel, progress=progress)
        # Requests to the server may ask for JSON or tools, also if no adapter has an output constraint.
        extras = [chosen, "server", *(["structured"] if manifest.task == GENERATION else [])]
        found = wheels.collect(extras, platform, [*earlier, *own], Path(folder), progress)
        contents: dict[str, Path | bytes] = {f"{WHEELS_FOLDER}/{item.path.name}": item.path for item in found}
        contents[PROGRAM_NAME] = board_program()
        contents["install.sh"] = install_script(platform)
        contents[sbom.NAME] = sbom.bill_of_materials(bundle, manifest, __version__, found).encode()
        if with_bundle:
            contents |= {f"{BUNDLE_FOLDER}/{name}": resolve(bundle, name) for name in (*manifest.files, MANIFEST_NAME)}
        files = output.listed(contents)
        described = describe(
            manifest.name,
            platform,
            files,
            found,
            board=known.name,
            engine=chosen,
            opening=opening,
            ram_mb=math.ceil(kept_mb),
            memory_max_mb=limit_mb,
        )
        contents[KIT_NAME] = described
        contents[SUMS_NAME] = sums = output.sums(files, described)
        output.write(contents, out, f"{manifest.name}-{known.name}")
    kit = parse_kit(described.decode())
    bundle_bytes = sum(file.bytes for file in kit.bundle_files)
    sizes = [file.bytes for file in files] + [len(described), len(sums)]
    names = tuple(item.path.name for item in found)
    return KitResult(out, kit.version, sum(sizes), bundle_bytes, names)


def describe(
    name: str,
    platform: Platform,
    files: Sequence[KitFile],
    found: Sequence[wheels.Wheel],
    *,
    board: str,
    engine: str,
    opening: Opening,
    ram_mb: int,
    memory_max_mb: int,
) -> bytes:
    """The bytes of kit.json.

    `ram_mb` is the memory that the bundle needs at least, `memory_max_mb` the limit of its unit.
    """
    manifest = next((file.sha256 for file in files if file.path == f"{BUNDLE_FOLDER}/{MANIFEST_NAME}"), None)
    raw: Mapping[str, Any] = {
        "schema": SCHEMA_VERSION,
        "name": name,
        "board": board,
        "machine": platform.machine,
        "python": platform.python,
        "engines": [engine],
        "opening": opening.given,
        "needs": {
            "instructions": list(platform.instructions),
            "glibc": f"2.{max(wheel.glibc_minor for wheel in found)}",
            "ram_mb": ram_mb,
            "packages_mb": math.ceil(sum(wheel.installed_bytes for wheel in found) / 1e6),
        },
        "wheels": wheels_id(platform.python, files),
        "bundle": manifest,
        "service": {"port": _PORT, "memory_max_mb": memory_max_mb},
        "files": [asdict(file) for file in files],
    }
    return (json.dumps(raw, indent=1, sort_keys=True) + "\n").encode()


def _memory_mb(
    bundle: Path, manifest: Manifest, engine: str, board: boards.Board, *, opening: Opening, device: str
) -> tuple[float, float]:
    """The memory that the bundle needs in MB, and what of it the system cannot drop.

    IncompatibleError if the board, which the user calls `device`, leaves less than the latter.
    """
    needs = needs_with(bundle, engine, opening)
    if needs is None:
        # There is no prediction: twice the files leaves room for activations and caches.
        guessed_mb = 2 * sum(file.bytes for file in manifest.files.values()) / 1e6 + COSTS[engine].runtime_mb
        return guessed_mb, guessed_mb
    words = " ".join([str(bundle), "--device", device, "--engine", engine, *opening.words()])
    found = fit.require_fit(needs, board, f"see what to change: edgetune devices fit {words}")
    return found.needed_mb, found.kept_mb


def needs_with(bundle: Path, engine: str | None, opening: Opening) -> Needs | None:
    """The needs of a bundle that is opened so; None for a task of which they are not predicted.

    `engine` is the bundle's first format if None. Raises what `with_options` raises; UsageError for keys and values
    of a bundle that has none.
    """
    manifest = read_manifest(bundle)
    if not task_types.load(manifest.task).offers("fit"):
        if opening.kv is not None:
            message = f"bundle {manifest.name!r} is for {manifest.task} and has no keys and values"
            raise UsageError(message, "leave --kv out")
        return None
    needs = needs_of_bundle(bundle, context_length=opening.context_length, engine=_engine(manifest, engine))
    return with_options(needs, kv=opening.kv, cache_mb=opening.cache_mb)


def _engine(manifest: Manifest, engine: str | None) -> str:
    formats = list(manifest.base.files)
    if engine is not None and engine not in formats:
        message = f"bundle {manifest.name!r} has no files for --engine {engine}"
        raise IncompatibleError(message, f"choose one of: {', '.join(formats)}; or build it with targets: [{engine}]")
    return engine or formats[0]


def _own_wheels(platform: Platform, folder: Path, *, engine: str, wheel: Path | None, progress: Progress) -> list[Path]:
    """The wheel of the runtime as it is here, in `folder/own`, and for llama.cpp `wheel` or one that is built."""
    name, data = runtime_wheel()
    own = folder / "own"
    own.mkdir()
    (own / name).write_bytes(data)
    return [own / name, *([wheel or llama_wheel(platform.name, progress=progress)] if engine == gguf.NAME else [])]
