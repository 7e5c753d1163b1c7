from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from edgetune_runtime import IncompatibleError, NotFoundError, Runtime, VerificationError
from edgetune_runtime.bundle import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    files_of_format,
    read_manifest,
    resolve,
    unchanged,
    verify_files,
)
from runtime.bundles import change_manifest

Change = Callable[[dict[str, Any]], object]


def test_a_manifest_reads_back_as_it_was_written(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.to_json() == (bundle / MANIFEST_NAME).read_text()
    assert list(manifest.adapters) == ["command", "tone", "whole"]
    assert manifest.adapter("tone").labels == ("red", "green", "warm red", "warm")


def test_keys_of_a_later_version_are_left_out(home: Path) -> None:
    change_manifest(
        home, lambda raw: (raw.update(later=1), raw["base"].update(later=1), raw["adapters"]["tone"].update(x=1))
    )
    assert isinstance(read_manifest(home), Manifest)


def test_keys_that_an_earlier_version_lacks_have_defaults(home: Path) -> None:
    change_manifest(
        home, lambda raw: (raw["base"].pop("values_by_type"), raw["adapters"]["tone"].pop("values_by_type"))
    )
    assert read_manifest(home).base.values_by_type == read_manifest(home).adapter("tone").values_by_type == {}


@pytest.mark.parametrize("place", [("base", "kv_values_per_token"), ("adapters", "tone", "scale"), ("context_length",)])
def test_an_integer_too_large_for_a_float_is_damage(home: Path, place: tuple[str, ...]) -> None:
    *parts, key = place

    def change(raw: Any) -> None:  # noqa: ANN401 - JSON
        for part in parts:
            raw = raw[part]
        raw[key] = 10**400

    change_manifest(home, change)
    with pytest.raises(VerificationError, match=f"is not a manifest: {key} cannot be '1000"):
        read_manifest(home)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_cannot_have_is_damage(home: Path, number: str) -> None:
    path = home / "manifest.json"
    change_manifest(home, lambda raw: raw["adapters"]["tone"].update(provenance={"loss": "NUMBER"}))
    path.write_text(path.read_text().replace('"NUMBER"', number))
    with pytest.raises(VerificationError, match=f"is not JSON: {number} is "):
        read_manifest(home)


def test_wrong_counts_of_modules_by_rank_are_damage(home: Path) -> None:
    for wrong in ({"four": 3}, {"4": -3}, {"0": 3}, {"4": None}):
        change_manifest(home, lambda raw, wrong=wrong: raw["adapters"]["tone"].update(modules_by_rank=wrong))
        with pytest.raises(VerificationError, match="is not a manifest"):
            read_manifest(home)


@pytest.mark.parametrize("labels", [["red", ""], ["red", "warm", "red"]])
def test_labels_that_cannot_be_told_apart_are_damage(labels: list[str], home: Path) -> None:
    change_manifest(home, lambda raw: raw["adapters"]["tone"].update(labels=labels))
    with pytest.raises(VerificationError, match="adapter 'tone' has an empty label, or one twice"):
        read_manifest(home)


def test_the_types_in_a_file_are_those_of_most_values(bundle: Path) -> None:
    base = read_manifest(bundle).base

    def types_in(quantization: str | None, values: dict[str, int]) -> str:
        return replace(base, quantization=quantization, values_by_type={"gguf": values}).types_in("gguf")

    assert types_in("q8_0", {"q8_0": 100, "f32": 1}) == "q8_0"
    assert types_in("q4_k_m", {"q5_0": 100, "q8_0": 10, "f32": 1}) == "q4_k_m (mostly q5_0)"
    assert types_in(None, {"q4_1": 100, "f32": 1}) == "q4_1"
    assert types_in("int8", {"f32": 1, "int8": 100}) == "int8"
    # Bundles of an earlier version do not count types.
    assert types_in("int8", {}) == "int8"
    assert types_in(None, {}) == "types not recorded"


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not a bundle"):
        read_manifest(tmp_path)
    with pytest.raises(NotFoundError, match="is not a bundle"):
        read_manifest(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"schema": 2}', '{"schema": "2"}', "[" * 100_000, "\ud800"])
def test_an_invalid_manifest_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(VerificationError, match="manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("schema", "remedy"), [(SCHEMA_VERSION + 1, "update edgetune-runtime"), (1, "build the bundle again")]
)
def test_another_schema_is_refused_with_what_to_do(schema: int, remedy: str, home: Path) -> None:
    change_manifest(home, lambda raw: raw.update(schema=schema))
    with pytest.raises(VerificationError, match=rf"has schema {schema}, this runtime reads {SCHEMA_VERSION}; {remedy}"):
        read_manifest(home)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("base"),
        lambda raw: raw["base"].pop("fingerprint"),
        lambda raw: raw["base"].update(quantization=4),
        lambda raw: raw["base"]["values_by_type"]["gguf"].update(f16="100"),
        lambda raw: raw.update(context_length="256"),
        lambda raw: raw.update(context_length=True),
        lambda raw: raw.update(threads=1.5),
        lambda raw: raw.update(adapters=[]),
        lambda raw: raw["adapters"].update(tone=None),
        lambda raw: raw["adapters"]["tone"].update(scale="1"),
        lambda raw: raw["adapters"]["tone"].update(labels="red"),
        lambda raw: raw["adapters"]["tone"].update(labels=[1]),
        lambda raw: raw["adapters"]["tone"].update(system=["be brief"]),
        lambda raw: raw["adapters"]["tone"].update(files={"gguf": 1}),
        lambda raw: raw["adapters"]["tone"].update(shapes={"gguf": "round"}),
        lambda raw: raw["files"]["base/model.gguf"].update(bytes="10"),
        lambda raw: raw["files"].pop("base/model.gguf"),
        lambda raw: raw["base"]["files"].update(gguf="../model.gguf"),
        lambda raw: raw["base"]["files"].update(gguf="/etc/passwd"),
        lambda raw: raw["files"].update({"x" * 300: {"sha256": "", "bytes": 0}}),
        lambda raw: raw["files"].update({"a//b": {"sha256": "", "bytes": 0}}),
        lambda raw: raw["files"].update({"..\\x": {"sha256": "", "bytes": 0}}),
        lambda raw: raw["files"].update({"base/\0": {"sha256": "", "bytes": 0}}),
        lambda raw: raw.update(name="home\x1b[2J"),
        lambda raw: raw.update(name="\ud800"),
        lambda raw: raw["base"].update(name="base\x9b2J"),
        lambda raw: raw["adapters"]["tone"].update(name="tone\n"),
        lambda raw: raw["adapters"]["tone"].update(method="\u202elora"),
    ],
)
def test_a_manifest_with_a_wrong_part_is_damaged(change: Change, home: Path) -> None:
    change_manifest(home, change)
    with pytest.raises(VerificationError) as caught:
        read_manifest(home)
    assert str(caught.value).isprintable()


def test_an_adapter_of_another_base_is_incompatible(home: Path) -> None:
    change_manifest(home, lambda raw: raw["adapters"]["tone"].update(base_fingerprint="0" * 64))
    with pytest.raises(IncompatibleError, match="'tone'"):
        read_manifest(home)


def test_sound_files_verify(bundle: Path) -> None:
    verify_files(bundle, read_manifest(bundle))


def test_a_flipped_bit_a_missing_byte_and_a_missing_file_are_found(home: Path) -> None:
    manifest = read_manifest(home)
    path = home / "base/model.gguf"
    flip(path, -1)
    with pytest.raises(VerificationError, match=r"model.*does not match"):
        verify_files(home, manifest)
    verify_files(home, manifest, [name for name in manifest.files if name != "base/model.gguf"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="bytes"):
        verify_files(home, manifest)
    path.unlink()
    with pytest.raises(VerificationError, match="missing"):
        verify_files(home, manifest)
    # Reading it would wait for a writer.
    os.mkfifo(path)
    with pytest.raises(VerificationError, match="missing"):
        verify_files(home, manifest)


def test_a_link_that_leads_outside_is_refused(home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.gguf"
    (home / "base/model.gguf").rename(outside)
    (home / "base/model.gguf").symlink_to(outside)
    with pytest.raises(VerificationError, match="outside"):
        resolve(home, "base/model.gguf")


def test_a_link_that_leads_to_itself_is_refused(home: Path) -> None:
    (home / "base/model.gguf").unlink()
    (home / "base/model.gguf").symlink_to("model.gguf")
    with pytest.raises(VerificationError):
        verify_files(home, read_manifest(home), ["base/model.gguf"])


def test_a_path_of_many_folders_is_refused_before_anything_is_made_of_them(home: Path) -> None:
    deep = "a/" * 8000
    change_manifest(home, lambda raw: raw["files"].update({f"{deep}{n}": {"sha256": "", "bytes": 0} for n in range(2)}))
    begin = time.process_time()
    with pytest.raises(VerificationError, match=r"in too many folders; do not use this bundle$"):
        read_manifest(home)
    assert time.process_time() < begin + 2


def overwrite(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_and_put_back(path: Path) -> None:
    path.rename(path.with_suffix(".aside"))
    path.write_bytes(b"other")
    path.with_suffix(".aside").replace(path)


def link_to_another(path: Path) -> None:
    other = Path(shutil.copy2(path, path.with_suffix(".other")))
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [overwrite, replace_and_put_back, link_to_another, Path.unlink])
def test_a_file_that_changes_while_it_is_opened_is_noticed(change: Callable[[Path], object], home: Path) -> None:
    names = read_manifest(home).files
    with unchanged(home, names):
        (home / "base/model.gguf").read_bytes()
    with pytest.raises(VerificationError, match=r"base/model\.gguf was changed"), unchanged(home, names):
        change(home / "base/model.gguf")


def test_a_manifest_that_is_a_pipe_or_larger_than_any_is_refused(home: Path) -> None:
    os.truncate(home / MANIFEST_NAME, 1 << 40)
    with pytest.raises(VerificationError, match="not a regular file"):
        read_manifest(home)
    (home / MANIFEST_NAME).unlink()
    os.mkfifo(home / MANIFEST_NAME)
    with pytest.raises(VerificationError, match="not a regular file"):
        read_manifest(home)


def test_a_format_without_any_file_is_not_offered_and_the_other_one_is_checked(home_of_both: Path) -> None:
    home = home_of_both
    whole = read_manifest(home)
    for name in files_of_format(whole, "onnx"):
        (home / name).unlink()
    manifest = read_manifest(home)
    assert list(manifest.base.files) == ["gguf"]
    assert {path.relative_to(home).as_posix() for path in home.rglob("*.*")} == {
        *manifest.files,
        MANIFEST_NAME,
    }
    verify_files(home, manifest)
    with Runtime.open(home) as runtime:
        assert runtime.generate("turn on", adapter="command", max_tokens=3).text
    with pytest.raises(IncompatibleError, match="the base has no file for engine 'onnx'"):
        Runtime.open(home, engine="onnx")
    (home / manifest.adapter("tone").files["gguf"]).unlink()
    with pytest.raises(VerificationError, match="is missing from bundle"):
        verify_files(home, read_manifest(home))


def test_a_format_with_some_of_its_files_is_damaged(home_of_both: Path) -> None:
    (home_of_both / read_manifest(home_of_both).base.files["onnx"]).unlink()
    assert list(read_manifest(home_of_both).base.files) == ["gguf", "onnx"]
    with pytest.raises(VerificationError, match="is missing from bundle"):
        verify_files(home_of_both, read_manifest(home_of_both))
