"""Makes a kit: everything that a board needs to install and run a bundle without a network."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgetune_devices import boards, fit
from edgetune_runtime import __version__, engines
from edgetune_runtime.bundle import Manifest, of_formats, read_manifest, resolve, verify_files
from edgetune_runtime.bundle.signatures import unlisted_in
from edgetune_runtime.decoding.single_flight import SingleFlightCache
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.sizing.needs import SERVER_MB, needs_of_bundle
from edgetune_runtime.sizing.options import with_options
from edgetune_runtime.store.kit import (
    BUNDLE_FOLDER,
    KIT_NAME,
    PLAIN_NAME,
    PROGRAM_NAME,
    SCHEMA_VERSION,
    SUMS_NAME,
    WHEELS_FOLDER,
    Kit,
    KitFile,
    bundle_identity,
    parse_kit,
    wheels_id,
)
from edgetune_runtime.store.opening import DEFAULTS, Opening
from edgetune_runtime.store.service import PORT

from edgetune.common.progress import Progress
from edgetune.delivery.wheel.build import llama_wheel, wheel_folder
from edgetune.delivery.wheel.platforms import SYSTEM_PYTHON
from edgetune.recipe import task_types

from . import output, rehearsal, sbom
from .program import board_program, install_script
from .runtime_wheel import runtime_wheel
from .target_python import TargetPython, target_python
from .wheels import Wheel, collect, require_llama_wheel

_HEADROOM = 1.25
"""The unit's memory limit in relation to the prediction: the kernel ends a process that exceeds it."""


@dataclass(frozen=True)
class KitOptions:
    """What a kit is made for: the board's Python, the engine, and how the board opens the bundle.

    `engine` is the bundle's first format if None; `wheel` one of llama-cpp-python to use instead of building it.
    """

    python: str = SYSTEM_PYTHON
    engine: str | None = None
    opening: Opening = DEFAULTS
    wheel: Path | None = None


@dataclass(frozen=True)
class AssembledKit:
    """A kit that is not written: its description, and all its files by their paths in it."""

    kit: Kit
    contents: output.Contents

    @property
    def program(self) -> KitFile:
        """The board program."""
        return next(file for file in self.kit.files if file.path == PROGRAM_NAME)

    def to_json(self) -> dict[str, Any]:
        """Version id, wheels, and sizes in bytes, as JSON values."""
        return {
            "version": self.kit.version,
            "bytes": sum(map(output.size_of, self.contents.values())),
            "bundle_bytes": sum(file.bytes for file in self.kit.bundle_files),
            "wheels": [file.name for file in self.kit.wheel_files],
        }


def make_kit(bundle: Path, board: str, out: Path, options: KitOptions, progress: Progress) -> AssembledKit:
    """Write the kit of a bundle for a board to `out`, a folder, or a tar file if it ends in .tar.

    Raises UsageError if `out` is something else, and what `assemble` raises.
    """
    output.check_destination(out)
    assembled = assemble(bundle, board, options, progress)
    output.write(assembled.contents, out, f"{assembled.kit.name}-{assembled.kit.board}")
    return assembled


def assemble(bundle: Path, board: str, options: KitOptions, progress: Progress) -> AssembledKit:
    """The kit of a bundle for a board; its large files stay in the bundle and in the cache of wheels.

    `board` is the name of a board or the path of a board file. Raises NotFoundError for an unknown board,
    IncompatibleError if the bundle does not fit on the board, if the board does not run Linux or `options.wheel` does
    not run there, or if there are no wheels for its Python, VerificationError if a file of the bundle is damaged or an
    adapter answers differently with `options.opening`, UnreachableError if wheels cannot be downloaded.
    """
    manifest, opening = read_manifest(bundle), options.opening
    if not PLAIN_NAME.fullmatch(manifest.name):
        raise UsageError(f"the bundle's name is {manifest.name!r}", "use up to 200 letters, digits, dots, - and _")
    facts = boards.find(board)
    target = target_python(facts, options.python)
    if options.wheel is not None:
        require_llama_wheel(options.wheel, target)
    engine = _engine(manifest, options.engine)
    needed_mb, kept_mb = _memory_mb(bundle, manifest, engine, facts, opening=opening, device=board)
    limit_mb = min(math.ceil(needed_mb * _HEADROOM), int(facts.free_mb))
    progress.say(f"checking the files of {manifest.name}")
    verify_files(bundle, manifest)
    rehearsal.require_golden(bundle, engine, opening, progress)
    runtime_name, runtime_data = runtime_wheel()
    with tempfile.TemporaryDirectory() as folder:
        runtime = Path(folder, runtime_name)
        runtime.write_bytes(runtime_data)
        llama = [options.wheel or llama_wheel(target.platform, progress=progress)] if engine == gguf.NAME else []
        extras = [engine, "server", "update", *task_types.load(manifest.task).runtime_extras]
        cache = wheel_folder() / f"{target.platform}-{target.python}"
        wheels = collect(extras, target, [runtime, *llama], cache, progress)
        contents: dict[str, Path | bytes] = {f"{WHEELS_FOLDER}/{item.path.name}": item.path for item in wheels}
        contents[PROGRAM_NAME] = board_program()
        contents["install.sh"] = install_script(target)
        contents[sbom.NAME] = sbom.bill_of_materials(bundle, manifest, engine, __version__, wheels).encode()
        names = (*of_formats(manifest, [engine]).files, *unlisted_in(bundle))
        contents |= {f"{BUNDLE_FOLDER}/{name}": resolve(bundle, name) for name in names}
        contents[f"{WHEELS_FOLDER}/{runtime_name}"] = runtime_data
        return with_description(
            contents,
            manifest.name,
            target,
            wheels,
            board=facts.name,
            engine=engine,
            opening=opening,
            ram_mb=math.ceil(kept_mb),
            memory_max_mb=limit_mb,
        )


def assembler(bundle: Path, options: KitOptions, progress: Progress) -> Callable[[str, str], AssembledKit]:
    """`assemble` for a board and its Python, once for each, also if several boards ask for it at the same time.

    UsageError if the bundle has no keys and values of the type in `options`.
    """
    if options.opening.kv is not None:
        needs_with(bundle, options.engine, options.opening)
    kits = SingleFlightCache[AssembledKit](keep=64)

    def kit_for(board: str, python: str) -> AssembledKit:
        return kits.get((board, python), lambda: assemble(bundle, board, replace(options, python=python), progress))

    return kit_for


def with_description(
    contents: output.Contents,
    name: str,
    target: TargetPython,
    wheels: Sequence[Wheel],
    *,
    board: str,
    engine: str,
    opening: Opening,
    ram_mb: int,
    memory_max_mb: int,
) -> AssembledKit:
    """The kit with these files, kit.json and SHA256SUMS.

    `ram_mb` is the memory that the bundle needs at least, `memory_max_mb` the limit of its unit.
    """
    files = output.listed(contents)
    raw: Mapping[str, Any] = {
        "schema": SCHEMA_VERSION,
        "name": name,
        "board": board,
        "machine": target.machine,
        "python": target.python,
        "engines": [engine],
        "opening": opening.changes,
        "needs": {
            "instructions": list(target.instructions),
            "glibc": f"2.{max(wheel.glibc_minor for wheel in wheels)}",
            "ram_mb": ram_mb,
            "packages_mb": math.ceil(sum(wheel.installed_bytes for wheel in wheels) / 1e6),
        },
        "wheels": wheels_id(target.python, files),
        "bundle": bundle_identity(files),
        "service": {"port": PORT, "memory_max_mb": memory_max_mb},
        "files": [asdict(file) for file in files],
    }
    text = json.dumps(raw, indent=1, sort_keys=True) + "\n"
    described = {KIT_NAME: text.encode(), SUMS_NAME: output.sums(files, text.encode())}
    return AssembledKit(parse_kit(text), {**contents, **described})


def _memory_mb(
    bundle: Path, manifest: Manifest, engine: str, board: boards.Board, *, opening: Opening, device: str
) -> tuple[float, float]:
    """The memory that the bundle needs in MB when it is served, and what of it the system cannot drop.

    IncompatibleError if the board, which the user calls `device`, leaves less than the latter.
    """
    needs = needs_with(bundle, engine, opening)
    if needs is None:
        # There is no prediction: twice the files leaves room for activations and caches.
        runtime_mb = engines.load_needs(engine).COST.runtime_mb
        guessed_mb = 2 * sum(file.bytes for file in manifest.files.values()) / 1e6 + runtime_mb + SERVER_MB
        return guessed_mb, guessed_mb
    words = " ".join([str(bundle), "--device", device, "--engine", engine, "--serve", *opening.words()])
    fitting = fit.require_fit(needs, board, f"see what to change: edgetune devices fit {words}")
    return fitting.needed_mb, fitting.kept_mb


def needs_with(bundle: Path, engine: str | None, opening: Opening) -> Needs | None:
    """The needs of a bundle that is opened and served so; None for a task of which they are not predicted.

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
    return with_options(needs, kv=opening.kv, cache_mb=opening.cache_mb, serves=True)


def _engine(manifest: Manifest, engine: str | None) -> str:
    formats = list(manifest.base.files)
    if engine is not None and engine not in formats:
        message = f"bundle {manifest.name!r} has no files for --engine {engine}"
        raise IncompatibleError(message, f"choose one of: {', '.join(formats)}; or build it with targets: [{engine}]")
    return engine or formats[0]
