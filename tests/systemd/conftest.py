"""A booted Debian with a kit. Only `make test-systemd` runs these tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgetune_export.backends.base import Source
from edgetune_runtime.store.opening import Opening
from repositories import make_keys, publish
from runtime.bundles import LIGHT_ON, Adapter, add_golden, low_rank, write_both
from systemd.machine import Machine, booted, missing, prepare

from edgetune.common.progress import Progress
from edgetune.delivery.kit.make import KitOptions, make_kit


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave this folder out unless it is named: it needs root and boots a system."""
    return None if any("systemd" in argument for argument in config.args) else True


@pytest.fixture(scope="session")
def bundle(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with ONNX files and a golden answer."""
    return _write(tiny_source("llama"), tmp_path_factory.mktemp("tiny") / "home", 1)


@pytest.fixture(scope="session")
def next_bundle(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with another adapter."""
    return _write(tiny_source("llama"), tmp_path_factory.mktemp("next") / "home", 2)


@pytest.fixture(scope="session")
def machine(bundle: Path, next_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A booted system that sees kits of both bundles as /mnt/kit and /mnt/next, and one with options as /mnt/other.

    /mnt/repo is a repository of the next bundle, and /mnt/root.json its root.
    """
    lacking = missing()
    if lacking:
        pytest.exit(f"a booted system needs {'; and '.join(lacking)}", returncode=5)
    shared = tmp_path_factory.mktemp("shared")
    shared.chmod(0o755)
    make_kit(bundle, "laptop", shared / "kit", KitOptions("3.13", "onnx"), Progress())
    make_kit(next_bundle, "laptop", shared / "next", KitOptions("3.13", "onnx"), Progress())
    make_kit(next_bundle, "laptop", shared / "other", KitOptions("3.13", "onnx", Opening(cache_mb=16)), Progress())
    keys = make_keys(tmp_path_factory.mktemp("keys") / "keys")
    publish(Path(shutil.copytree(next_bundle, tmp_path_factory.mktemp("published") / "home")), shared / "repo", keys)
    shutil.copy(keys.roots[0], shared / "root.json")
    with booted(prepare(), shared) as found:
        yield found


def _write(source: Source, out: Path, seed: int) -> Path:
    adapters = {"one": Adapter(low_rank(source.path, seed))}
    return add_golden(write_both(out, source, adapters), ("onnx",), {"one": LIGHT_ON})
