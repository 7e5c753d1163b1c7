"""A small bundle of each kind, made once: two adapters that change answers, one merged model."""

from __future__ import annotations

import json
import os
import pwd
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from edgetune_export.adapters.fold import merge
from edgetune_export.backends.base import EncoderSource, Source
from edgetune_export.backends.gguf.backend import write_merged
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import ConfidenceCurve, sha256_of
from edgetune_runtime.cli import main
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.serving import places
from runtime.bundles import CASES, Adapter, add_onnx, change_manifest, folded, low_rank, write_both, write_bundle
from runtime.encoders import write_encoder_bundle
from runtime.tools.templates import CONTROLS
from weights import weights_in

SYSTEM = "answer in one word"
LONG_PROMPTS = ("answer in one word and play " * 2, "turn on the warm light in the hall " * 2)
LABELS = ("red", "green", "warm red", "warm")
TOOLS_CONTEXT = 2048
_NOBODY = 65534
VALUE_CURVE, LABEL_CURVE = ConfidenceCurve(50, 0.9, 0.5, -1.0, 0.02), ConfidenceCurve(50, 0.9, 0.25, 0.5, 0.02)
Run = Callable[..., tuple[int, str, str]]


@contextmanager
def without_free_files() -> Iterator[None]:
    """Let this process open no more files meanwhile, and so start no process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: exit code, standard output and standard error of `edgetune-run`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def bundle_of(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bundle_of(arch)`: a bundle with `command` (a system prompt), `tone` (scale 0.5, labels) and `whole` (merged)."""

    @cache
    def make(arch: str) -> Path:
        base, folder = tiny_gguf(arch), tmp_path_factory.mktemp(arch)
        merged = {"whole": merge_into(base, 5, folder / "whole.gguf")}
        return write_bundle(folder / "home", base, adapters_of(base), merged)

    return make


@pytest.fixture(scope="session")
def both_of(
    bundle_of: Callable[[str], Path],
    tiny_source: Callable[[str], Source],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """`both_of(arch)`: the same bundle with all in ONNX too. Copy it before changing it."""

    @cache
    def make(arch: str) -> Path:
        bundle = Path(shutil.copytree(bundle_of(arch), tmp_path_factory.mktemp(f"{arch}-both") / "home"))
        source = tiny_source(arch)
        add_onnx(bundle, source, adapters_of(source.path))
        return bundle

    return make


@pytest.fixture(scope="session")
def sure_bundle(both_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of both formats whose adapters `command` and `tone` have curves of their confidence."""
    bundle = Path(shutil.copytree(both_of("llama"), tmp_path_factory.mktemp("sure") / "home"))
    curves = {"value": VALUE_CURVE, "question": VALUE_CURVE, "label": LABEL_CURVE, "choice": ConfidenceCurve(3, 1.0)}
    stored = {kind: asdict(curve) for kind, curve in curves.items()}

    def change(raw: dict[str, Any]) -> None:
        for name in ("command", "tone"):
            raw["adapters"][name]["confidence"] = {"gguf": stored, "onnx": stored}

    change_manifest(bundle, change)
    return bundle


@pytest.fixture(scope="session")
def prompted_of(
    tiny_gguf: Callable[[str], Path],
    tiny_source: Callable[[str], Source],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """`prompted_of(arch)`: a bundle whose adapters `one` and `two` have long prompts, in the formats of CASES."""

    @cache
    def make(arch: str) -> Path:
        base = tiny_gguf(arch)
        adapters = {
            "one": Adapter(low_rank(base, seed=1), system=LONG_PROMPTS[0]),
            "two": Adapter(low_rank(base, seed=2, rank=3), scale=0.5, system=LONG_PROMPTS[1]),
        }
        bundle = write_bundle(tmp_path_factory.mktemp(f"{arch}-prompted") / "home", base, adapters)
        if ("onnx", arch) in CASES:
            add_onnx(bundle, tiny_source(arch), adapters)
        return bundle

    return make


@pytest.fixture(scope="session")
def merged_of(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`merged_of(arch)`: a bundle with `one` (a long system prompt), and the merged models `whole` and `other`, in the
    formats of CASES."""

    @cache
    def make(arch: str) -> Path:
        source, root = tiny_source(arch), tmp_path_factory.mktemp("merged")
        adapters = {"one": Adapter(low_rank(source.path, seed=1), system=LONG_PROMPTS[0])}
        merged = {
            name: merge_into(source.path, seed, root / f"{name}.gguf")
            for seed, name in enumerate(("whole", "other"), 5)
        }
        bundle = write_bundle(root / "home", source.path, adapters, merged)
        if ("onnx", arch) in CASES:
            add_onnx(bundle, source, adapters)
        return bundle

    return make


@pytest.fixture(scope="session")
def merged_bundle(merged_of: Callable[[str], Path]) -> Path:
    """The bundle with merged models of the LLaMA base."""
    return merged_of("llama")


def merge_into(base: Path, seed: int, out: Path) -> Path:
    """The base with a random low-rank adapter merged into its weights."""
    write_merged(merge(folded(base, low_rank(base, seed)), weights_in(base)), Source(base, ""), out)
    return out


def adapters_of(base: Path) -> dict[str, Adapter]:
    """The low-rank adapters of the bundles above."""
    return {
        "command": Adapter(low_rank(base, seed=1), system=SYSTEM),
        "tone": Adapter(low_rank(base, seed=2, rank=3), scale=0.5, labels=LABELS),
    }


@pytest.fixture(scope="session")
def bundle(bundle_of: Callable[[str], Path]) -> Path:
    """The bundle of the LLaMA base. Copy it before changing it."""
    return bundle_of("llama")


@pytest.fixture
def home(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to change."""
    return Path(shutil.copytree(bundle, tmp_path / "home"))


@pytest.fixture
def home_of_both(both_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """The same, in both formats."""
    return Path(shutil.copytree(both_of("llama"), tmp_path / "home"))


@pytest.fixture
def sure_home(sure_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `sure_bundle` to change."""
    return Path(shutil.copytree(sure_bundle, tmp_path / "home"))


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def opened(engine: str, prompted_of: Callable[[str], Path]) -> Iterator[Runtime]:
    """A bundle whose adapters have long system prompts, in each engine."""
    with Runtime.open(prompted_of("llama"), engine=engine, disk_mb=0) as runtime:
        yield runtime


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def runtime(bundle: Path) -> Iterator[Runtime]:
    """The bundle, opened anew for each test, with one context, no states on the disk, and calls that are not exact."""
    with Runtime.open(bundle, contexts=1, disk_mb=0, exact=False) as opened:
        yield opened


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call gives up waiting for a stream of its own thread sooner."""
    monkeypatch.setattr(places, "PATIENCE_S", 0.5)


@pytest.fixture
def unreadable() -> Iterator[Path]:
    """A folder that this process may not read, as that of another user; root gives up its rights meanwhile."""
    user = os.geteuid()
    # Not in tmp_path, whose parents are for root only.
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0)
        os.seteuid(user or _NOBODY)
        yield Path(folder)
        os.seteuid(user)
        Path(folder).chmod(0o700)


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that has no home folder, as in a container with a user id of its own."""

    def no_entry(_uid: int) -> None:
        raise KeyError

    for name in ("HOME", "EDGETUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


@pytest.fixture(scope="session")
def encoder_bundle(encoder_source: Callable[[str], EncoderSource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny BERT with two tasks. Copy it before changing it."""
    return write_encoder_bundle(encoder_source("bert"), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tools_bundle(
    tiny_folder: Callable[[str], Path], convert: Callable[[Path, Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle whose adapter `one` has a long system prompt, in both formats.

    Its vocabulary has the control tokens that begin calls, and its context has room for tools.
    """
    import torch  # noqa: PLC0415 - torch only where a test needs a base
    from tiny import make_folder, make_tokenizer  # noqa: PLC0415

    from edgetune.bases import Base, load_torch  # noqa: PLC0415

    root = tmp_path_factory.mktemp("tools")
    folder = make_folder("llama", root / "llama", make_tokenizer(root, CONTROLS))
    config = folder / "config.json"
    # With few words of English, each letter is a token.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": TOOLS_CONTEXT}))
    path = folder.with_suffix(".gguf")
    convert(folder, path)
    base = Base("llama", path, sha256_of(path), read_header(path))
    source = Source(path, base.fingerprint, load_torch(base, torch.float32), root / "work")
    adapters = {"one": Adapter(low_rank(path, seed=1), system=LONG_PROMPTS[0])}
    bundle = write_both(root / "home", source, adapters)
    change_manifest(bundle, lambda raw: raw.update(context_length=TOOLS_CONTEXT))
    return bundle
