from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from edgetune_runtime.errors import OutOfSpaceError
from edgetune_runtime.formats.atomic import replacing, swap_in

SWAPS = """
import sys
from pathlib import Path
from edgetune_runtime.formats.atomic import swap_in
out = Path(sys.argv[1])
for number in range(500):
    made = out.with_name(f"made-{number}")
    made.mkdir()
    swap_in(made, out)
"""


def test_nobody_can_put_a_link_at_the_name_of_a_temporary_file(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with replacing(tmp_path / "out") as temporary:
            assert not temporary.exists()
            names.add(temporary.name)
            temporary.touch()
    assert len(names) == 2


def test_a_folder_replaces_another_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("one", "two"):
        made = tmp_path / "made"
        made.mkdir()
        (made / "text").write_text(text)
        swap_in(made, out)
        assert (out / "text").read_text() == text
        assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange folders in one step")
def test_a_folder_is_there_at_any_moment_of_its_replacement(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", SWAPS, str(out)]) as swapping:
        while swapping.poll() is None:
            assert out.is_dir()
    assert swapping.returncode == 0 and list(tmp_path.iterdir()) == [out]


def test_a_file_above_the_limit_of_its_size_is_out_of_space(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutOfSpaceError, match="no space left"), replacing(tmp_path / "out") as path:
            path.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
