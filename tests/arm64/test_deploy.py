"""A deploy to an sshd on the emulated board: cut in the middle, resumed, refused and rolled back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arm64.board import SHARED, Board
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import GoldenAnswer, read_manifest
from edgetune_runtime.errors import UnreachableError, VerificationError
from edgetune_runtime.inference.golden import ask
from runtime.bundles import change_manifest
from sshd import Sshd, cut_in_the_middle, running

from edgetune.common.progress import Progress
from edgetune.delivery.deploy.deploy import Deployed, DeployOptions, Where, deploy, list_versions, roll_back
from edgetune.delivery.deploy.target import parse_target
from edgetune.delivery.kit.make import AssembledKit, KitOptions, assemble

CPU = "cortex-a72"
PROMPT = "turn on the light in the hall"
GOLDEN_TOKENS = 4


@pytest.fixture(scope="module")
def sshd(board: Board) -> Iterator[Sshd]:
    """The board's own sshd."""
    folder = board.shared / "sshd"
    folder.mkdir()
    seen_as = f"{SHARED}/sshd"
    with running(folder, "/usr/bin", enter=board.entering(CPU), seen_as=seen_as, variables=f"QEMU_CPU={CPU}") as found:
        found.trust(found.public_key("host"))
        yield found


@pytest.fixture(params=["gguf", "onnx"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def own_bundle(bundle: Path, engine: str, tmp_path: Path) -> Path:
    """A copy of the bundle with a short golden answer of its first adapter only, since each deploy asks for it."""
    copy = Path(shutil.copytree(bundle, tmp_path / "home"))
    with Runtime.open(copy, engine=engine, disk_mb=0) as runtime:
        name = next(iter(runtime.manifest.adapters))
        answer = ask(runtime, name, GoldenAnswer(PROMPT, "", max_tokens=GOLDEN_TOKENS))
    golden = {engine: {"prompt": PROMPT, "answer": answer, "max_tokens": GOLDEN_TOKENS}}

    def replace(raw: dict[str, Any]) -> None:
        for adapter in raw["adapters"].values():
            adapter.pop("golden", None)
        raw["adapters"][name]["golden"] = golden

    change_manifest(copy, replace)
    return copy


def test_a_deploy_that_was_cut_resumes_and_a_wrong_answer_is_refused(
    board: Board, sshd: Sshd, own_bundle: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{sshd.programs}{os.pathsep}{os.environ['PATH']}")
    target, where = parse_target(sshd.target), Where("home", f"{SHARED}/deployed-{engine}")
    prefix = board.shared / f"deployed-{engine}"

    def make(name: str, python: str) -> AssembledKit:
        return assemble(own_bundle, name, KitOptions(python, engine), Progress())

    def send() -> Deployed:
        return deploy(target, where, make, DeployOptions("pi-4"), Progress())

    def states() -> list[tuple[str, str]]:
        return [(item["version"], item["state"]) for item in list_versions(target, where).versions]

    with cut_in_the_middle(prefix / "files"), pytest.raises(UnreachableError, match="connection was lost"):
        send()
    there = sum(path.stat().st_size for path in (prefix / "files").iterdir())
    assert not (prefix / "current").is_symlink()
    first = send()
    kit = make("pi-4", "3.13").kit
    assert there > 0
    assert first.sent_bytes < sum(file.bytes for file in kit.files)
    assert states() == [(first.version, "current")]

    answer = change_golden(own_bundle, engine, lambda _: "no such answer")
    with pytest.raises(VerificationError, match="adapters answer differently"):
        send()
    assert states()[0] == (first.version, "current")

    change_golden(own_bundle, engine, lambda _: answer)
    change_manifest(own_bundle, lambda raw: raw.update(created="later"))
    second = send()
    assert second.sent_bytes < 1_000_000
    assert states() == [(second.version, "current"), (first.version, "previous")]
    damaged = prefix / "current/bundle" / read_manifest(own_bundle).base.files[engine]
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert send().sent_bytes == damaged.stat().st_size
    assert roll_back(target, where).version == first.version
    installed = f"{SHARED}/{prefix.name}"
    check = (f"{installed}/bin/edgetune-run", "check", f"{installed}/current/bundle", "--engine", engine)
    assert "same" in board.run(*check, cpu=CPU)


def change_golden(bundle: Path, engine: str, change: Callable[[str], str]) -> str:
    """Change the golden answer of the first adapter; the one before."""
    before = ""

    def apply(raw: dict[str, Any]) -> None:
        nonlocal before
        golden = next(adapter["golden"][engine] for adapter in raw["adapters"].values() if adapter.get("golden"))
        before, golden["answer"] = golden["answer"], change(golden["answer"])

    change_manifest(bundle, apply)
    return before
