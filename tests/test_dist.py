"""Builds both distributions and runs what their wheels install in an environment without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from edgetune_runtime import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
(TEMPLATE,) = (ROOT / "edgetune").rglob("template_recipe.yaml")
# The packages of each distribution, by the folder of its pyproject.toml.
PACKAGES = {
    "edgetune": (ROOT, ("edgetune", "devices/edgetune_devices", "export/edgetune_export")),
    "edgetune_runtime": (ROOT / "runtime", ("edgetune_runtime",)),
}
# What hatchling adds to every source distribution, and the changelog.
BESIDE = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "hatch_build.py", "pyproject.toml"}


@dataclass(frozen=True)
class Built:
    """The two files of a distribution."""

    wheel: Path
    sdist: Path

    def metadata(self) -> Message:
        """The core metadata in the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return message_from_string(archive.read(name).decode())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Both distributions, each wheel built from its sdist, as a package index would get them."""
    out = tmp_path_factory.mktemp("dist")
    for folder, _ in PACKAGES.values():
        call(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(folder))
    return {
        name: Built(out / f"{name}-{__version__}-py3-none-any.whl", out / f"{name}-{__version__}.tar.gz")
        for name in PACKAGES
    }


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment without any package."""
    return environment(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="session")
def installed(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with both wheels, which sees what they depend on, but not the repository."""
    root = tmp_path_factory.mktemp("installed")
    programs = environment(root)
    install(programs, *(files.wheel for files in built.values()))
    # A .pth file is read where Python looks for one by itself, so those of editable installs have no effect here.
    (site,) = root.glob("**/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def environment(root: Path) -> Path:
    """Make an environment in `root`, without pip."""
    venv.create(root, with_pip=False, symlinks=os.name != "nt")
    return root / ("Scripts" if os.name == "nt" else "bin")


def install(programs: Path, *wheels: Path) -> None:
    """Install wheels without what they depend on and without a network."""
    pip = (sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--no-index", "--no-deps")
    call(*pip, *map(str, wheels))


def call(*command: str) -> str:
    """Run a command outside the repository; its standard output."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean, cwd=Path(ROOT.anchor))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_distributions_have_one_version_and_license(built: dict[str, Built]) -> None:
    for files in built.values():
        metadata = files.metadata()
        assert metadata["Version"] == __version__
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.11"
    requirements = built["edgetune"].metadata().get_all("Requires-Dist", [])
    assert f"edgetune-runtime[gguf,onnx,structured]=={__version__}" in requirements
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "runtime/LICENSE").read_bytes()


@pytest.mark.parametrize("name", PACKAGES)
def test_sdist_holds_the_packages_and_nothing_else_of_the_repository(name: str, built: dict[str, Built]) -> None:
    with tarfile.open(built[name].sdist) as archive:
        found = {member.removeprefix(f"{name}-{__version__}/") for member in archive.getnames()}
    root, _ = PACKAGES[name]
    sources = {path.relative_to(root).as_posix() for package in packages(name) for path in files_of(package)}
    assert sources <= found
    assert {"LICENSE", "README.md", "pyproject.toml"} <= found - sources <= BESIDE


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_holds_the_packages_and_the_license(name: str, built: dict[str, Built]) -> None:
    with zipfile.ZipFile(built[name].wheel) as archive:
        found = set(archive.namelist())
    info = f"{name}-{__version__}.dist-info/"
    assert f"{info}licenses/LICENSE" in found
    sources = {path.relative_to(package.parent).as_posix() for package in packages(name) for path in files_of(package)}
    assert {path for path in found if not path.startswith(info)} == sources
    assert {f"{package.name}/py.typed" for package in packages(name)} <= sources
    if name == "edgetune":
        templates = {TEMPLATE.relative_to(ROOT).as_posix(), "edgetune/comparison/page.html.jinja"}
        assert {*templates, "edgetune_devices/boards/pi-4.toml"} <= sources


def packages(name: str) -> list[Path]:
    """The folders of a distribution's packages."""
    root, folders = PACKAGES[name]
    return [root / folder for folder in folders]


def files_of(package: Path) -> list[Path]:
    """All files of a package, but what Python compiled."""
    return [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("program", ["edgetune", "edgetune-run"])
def test_commands_run_from_the_wheels(program: str, installed: Path) -> None:
    assert "Usage" in call(str(installed / program), "--help").title()
    assert call(str(installed / program), "--version") == f"{program} {__version__}\n"


def test_packages_are_imported_from_the_wheels(installed: Path) -> None:
    names = [package.name for name in PACKAGES for package in packages(name)]
    code = f"import {', '.join(names)}; print(*(m.__file__ for m in ({', '.join(names)})), sep='\\n')"
    files = call(str(installed / "python"), "-c", code).splitlines()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def test_the_template_recipe_and_boards_are_found_in_the_wheels(installed: Path, tmp_path: Path) -> None:
    call(str(installed / "edgetune"), "init", str(tmp_path / "recipe.yaml"))
    assert (tmp_path / "recipe.yaml").read_bytes() == TEMPLATE.read_bytes()
    assert "pi-4" in call(str(installed / "edgetune"), "devices", "list")


def test_the_runtime_starts_without_any_other_package(built: dict[str, Built], empty: Path) -> None:
    install(empty, built["edgetune_runtime"].wheel)
    assert call(str(empty / "edgetune-run"), "--version") == f"edgetune-run {__version__}\n"
    assert "generate" in call(str(empty / "edgetune-run"), "--help")
    assert "Runtime" in call(str(empty / "python"), "-c", "import edgetune_runtime as e; print(e.__all__)")
