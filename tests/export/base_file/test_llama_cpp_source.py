from __future__ import annotations

import io
import tarfile
from pathlib import Path

from edgetune_export.base_file.llama_cpp_source import unpack_source

ROOT = "llama_cpp_python-1"


def test_only_files_of_the_parts_are_unpacked_and_none_outside_the_folder(tmp_path: Path) -> None:
    archive, folder = tmp_path / f"{ROOT}.tar.gz", tmp_path / "folder"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("src/a.c", "src/../../../outside", "notes"):
            entry = tarfile.TarInfo(f"{ROOT}/{name}")
            entry.size = 2
            tar.addfile(entry, io.BytesIO(b"ok"))
        link = tarfile.TarInfo(f"{ROOT}/src/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    unpacked = unpack_source(archive, folder, ["src/", "LICENSE"])
    assert unpacked == folder / ROOT
    assert [path for path in folder.rglob("*") if not path.is_dir()] == [unpacked / "src/a.c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", archive.name]
