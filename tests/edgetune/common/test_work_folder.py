from __future__ import annotations

from pathlib import Path

import pytest
from edgetune_runtime.errors import UsageError

from edgetune.common.work_folder import beside, work_folder


def test_a_folder_by_a_path_without_its_name_has_the_same_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "adapters").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "adapters")
    assert work_folder(Path("..")) == tmp_path / "home.work"
    monkeypatch.chdir(tmp_path / "home")
    assert work_folder(Path()) == tmp_path / "home.work"
    assert beside(Path("build/home"), ".yaml") == Path("build/home.yaml")


def test_the_root_is_not_a_folder_for_a_bundle() -> None:
    with pytest.raises(UsageError, match="/ is the root of the file system, not a folder for a bundle; choose"):
        work_folder(Path("/"))
