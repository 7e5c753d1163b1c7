"""Every field of kit.json is checked before anything of the kit is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edgetune_runtime.bundle.files import bundle_path
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.store.kit import KIT_NAME, parse_kit, read_kit
from kits import KitMaker

FILE = {"path": "bundle/x", "sha256": "0" * 64, "bytes": 1}
PATHS = (
    "",
    "bundle",
    "bundle/",
    "bundle//x",
    "bundle/./x",
    "bundle/../x",
    "/bundle/x",
    "bundle\\x",
    "bundle/\0",
    "bundle/\x1b[2J",
    "bundle/\x9b2J",
    "bundle/a\nb",
    "bundle/" + "x" * 300,
    "wheels/-r",
    "wheels/-r.whl",
    "wheels/a/b.whl",
    "wheels/a.txt",
    "other/x",
    "-x",
    "kit.json",
    "SHA256SUMS",
)
NEEDS = {"instructions": [], "glibc": "2.28", "ram_mb": 1, "packages_mb": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    kit = KitMaker(tmp_path_factory.mktemp("kits"))("one")
    return (kit / KIT_NAME).read_text(encoding="utf-8")


def refused(text: str, **fields: object) -> str:
    with pytest.raises(VerificationError) as caught:
        parse_kit(json.dumps({**json.loads(text), **fields}))
    message = str(caught.value)
    assert message.startswith("kit.json is damaged: ") and message.isprintable() and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "home\nExecStart=/bin/sh"),
        ("name", "a" * 300),
        ("board", "pi\x1b]0;title\x07"),
        ("machine", "x86_64; rm"),
        ("python", "3.11\n"),
        ("python", "3"),
        ("engines", []),
        ("engines", ["gguf\nExecStartPre=/bin/sh"]),
        ("engines", ["gguf --host 0.0.0.0"]),
        ("engines", [5]),
        ("engines", "gguf"),
        ("wheels", "0123456789abcdef"),
        ("wheels", "../../x"),
        ("bundle", None),
        ("bundle", 5),
        ("bundle", "0" * 64),
        ("service", {"port": 0, "memory_max_mb": 1}),
        ("service", {"port": 70000, "memory_max_mb": 1}),
        ("service", {"port": True, "memory_max_mb": 1}),
        ("service", {"port": 8080, "memory_max_mb": -1}),
        ("opening", []),
        ("opening", {"context_length": 10**400}),
        ("opening", {"kv": "f16\n"}),
        ("needs", {**NEEDS, "ram_mb": -1}),
        ("needs", {**NEEDS, "ram_mb": 10**30}),
        ("needs", {**NEEDS, "glibc": "2.x\x1b"}),
        ("needs", {**NEEDS, "instructions": ["asimd\x1b"]}),
        ("needs", {**NEEDS, "instructions": "asimd"}),
        ("files", {}),
        ("files", [5]),
        ("files", [{**FILE, "bytes": -1}]),
        ("files", [{**FILE, "bytes": 1.5}]),
        ("files", [{**FILE, "bytes": 10**30}]),
        ("files", [{**FILE, "sha256": "0" * 63}]),
        *(("files", [{**FILE, "path": path}]) for path in PATHS),
    ],
)
def test_a_wrong_field_is_one_line(text: str, field: str, value: object) -> None:
    refused(text, **{field: value})


def test_the_id_of_the_environment_is_that_of_the_listed_wheels(text: str) -> None:
    files = json.loads(text)["files"]
    (wheel,) = (file for file in files if file["path"].startswith("wheels/edgetune"))
    wheel["sha256"] = "0" * 64
    assert "not the id of the listed wheels" in refused(text, files=files)


def test_a_file_is_listed_once(text: str) -> None:
    files = json.loads(text)["files"]
    assert "twice" in refused(text, files=[*files, files[0]])


def test_a_file_of_a_bundle_has_the_same_paths_in_a_kit(text: str) -> None:
    longest = bundle_path(f"{'ä' * 90}/{'x' * 19}")
    files = [*json.loads(text)["files"], {**FILE, "path": f"bundle/{longest}"}]
    assert parse_kit(json.dumps({**json.loads(text), "files": files})).bundle_files[-1].name == "x" * 19
    with pytest.raises(ValueError, match="too long"):
        bundle_path(f"{longest}x")
    files[-1]["path"] += "x"
    assert "which is too long" in refused(text, files=files)


def test_a_kit_json_of_any_size_is_read_up_to_a_limit_and_none_beyond_it_is_made(tmp_path: Path) -> None:
    text = " " * 10**7 + "{}"
    (tmp_path / KIT_NAME).write_text(text)
    for read, source in ((read_kit, tmp_path), (parse_kit, text)):
        with pytest.raises(VerificationError, match="more than 10000000 bytes"):
            read(source)
