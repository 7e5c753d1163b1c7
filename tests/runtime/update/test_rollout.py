from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgetune_runtime.bundle import FileEntry
from edgetune_runtime.errors import NotFoundError, VerificationError
from edgetune_runtime.update import rollout
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.release import MOST_OLDER, Release, parse_release, path_of
from edgetune_runtime.update.rollout import choose, device_id
from edgetune_runtime.update.state import read_state
from edgetune_runtime.update.trust import TrustedRepository
from edgetune_runtime.update.update import UpdateSource, check
from kits import ask
from repositories import START, Publisher, apply

pytestmark = pytest.mark.slow


@pytest.fixture
def machine_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file with the id of this system; there is none yet."""
    monkeypatch.setattr(rollout, "_MACHINE_ID", tmp_path / "machine-id")
    return tmp_path / "machine-id"


def release(version: int, bundle: str = "ab" * 32, **fields: object) -> Release:
    return Release("home", "stable", version, {"manifest.json": FileEntry(bundle, 1)}, ("gguf",), 1, **fields)  # type: ignore[arg-type]


def test_a_share_of_the_devices_takes_a_release_and_keeps_it_when_the_share_grows() -> None:
    devices = [f"{number:032x}" for number in range(2000)]

    def taken(share: float, bundle: str = "ab" * 32) -> set[str]:
        return {device for device in devices if choose(release(2, bundle, share=share), release, device, 0).fits}

    tenth, half = taken(0.1), taken(0.5)
    assert 140 < len(tenth) < 260 and 900 < len(half) < 1100
    assert tenth < half
    assert (taken(0.0), taken(1.0)) == (set(), set(devices))
    assert len(tenth & taken(0.1, "cd" * 32)) < 50


def test_what_is_not_for_a_device_falls_back_to_the_newest_that_is_not_before_its_floor() -> None:
    newest = release(9, min_runtime="99.0", older=(7, 5, 3))
    others = {7: release(7, share=0), 5: release(5), 3: release(3)}
    found = choose(newest, others.__getitem__, "00" * 16, floor=5)
    assert (found.release.version, found.fits) == (5, True)
    assert found.held_back is not None and found.held_back.startswith("release 9 of home needs edgetune-runtime 99.0")
    found = choose(newest, others.__getitem__, "00" * 16, floor=6)
    assert (found.release.version, found.fits) == (9, False)


def test_the_id_of_a_device_is_a_hash_of_that_of_its_system_or_a_random_one_that_is_kept(machine_id: Path) -> None:
    first = device_id("home", "")
    assert len(first) == 32 and device_id("home", "") != first and device_id("home", first) == first
    for text in ("", "uninitialized\n", "ab" * 15):
        machine_id.write_text(text)
        assert device_id("home", first) == first
    machine_id.write_text("ab" * 16 + "\n")
    found = device_id("home", first)
    assert found not in {first, "ab" * 16} and device_id("home", "") == found != device_id("other", "")


def test_an_older_release_of_another_version_than_its_path_is_refused(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher("one")
    publisher("two", share=0.5)
    trusted = TrustedRepository(
        Location(str(publisher.repo)), tmp_path / "metadata", publisher.root.read_bytes(), START
    )
    trusted.refresh()
    assert trusted.release("home", "stable", 1).version == 1
    newest = trusted.read_target(path_of("home", "stable"), tmp_path / "newest.json")
    monkeypatch.setattr(trusted, "read_target", lambda *_: newest)
    with pytest.raises(VerificationError, match=r"the release home/stable@1\.json is 2 of home in stable"):
        trusted.release("home", "stable", 1)


@pytest.mark.parametrize("value", [None, False, 0, [], {}])
def test_a_release_for_no_runtime_that_there_is_is_damaged(value: object, publisher: Publisher) -> None:
    raw = json.loads(publisher("one").release.to_json())
    raw["min_runtime"] = value
    with pytest.raises(VerificationError, match="the release is damaged: min_runtime is"):
        parse_release(json.dumps(raw).encode())


def test_a_staged_release_reaches_a_device_when_it_is_published_for_more(
    prefix: Path, publisher: Publisher, machine_id: Path
) -> None:
    publisher("one")
    apply(prefix, publisher)
    publisher("two", share=0.0)
    found = apply(prefix, publisher)[0].to_json()
    assert (found["release"], found["refused"]) == (1, None)
    assert found["held_back"] == "release 2 of home is for 0% of the devices so far, and this is not one of them"
    assert ask(prefix) == "one"
    device = read_state(prefix).device
    publisher("two")
    assert apply(prefix, publisher)[0].to_json()["held_back"] is None
    assert (ask(prefix), read_state(prefix).device) == ("two", device)
    # It keeps a release that is not for it any more.
    publisher("two", share=0.0)
    assert apply(prefix, publisher)[0].to_json()["available"] is False
    assert ask(prefix) == "two"


def test_a_bundle_that_is_published_again_for_fewer_devices_reaches_no_others(
    prefix: Path, publisher: Publisher
) -> None:
    publisher("one")
    publisher("one", share=0.0)
    assert apply(prefix, publisher)[0].to_json()["available"] is False
    assert ask(prefix) == "zero"


def test_a_device_that_no_release_is_for_yet_has_none(prefix: Path, publisher: Publisher) -> None:
    publisher("one", share=0.0)
    assert apply(prefix, publisher)[0].to_json()["refused"].startswith("release 1 of home is for 0%")
    assert ask(prefix) == "zero"
    with pytest.raises(NotFoundError, match="nothing is installed: release 1 of home is for 0%"):
        apply(prefix.parent / "new", publisher)


def test_a_new_device_gets_the_last_release_for_all_however_many_follow_it_for_none(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher.formats = ["gguf", "onnx"]
    publisher("one")
    publisher.formats = ["gguf"]
    for number in range(MOST_OLDER + 1):
        publisher(f"halted {number}", share=0.0)
    source = UpdateSource(repo=str(publisher.repo), root=publisher.root, formats=("onnx",))
    assert check(tmp_path / "new", source).release.version == 1


def test_a_release_for_a_newer_runtime_is_skipped_for_the_newest_that_this_one_can_run(
    prefix: Path, publisher: Publisher
) -> None:
    publisher("one")
    publisher("two")
    publisher("three", min_runtime="99.1")
    publisher("four", min_runtime="99.2")
    found = apply(prefix, publisher)[0]
    assert (found.release.version, ask(prefix)) == (2, "two")
    assert "release 4 of home needs edgetune-runtime 99.2" in str(found.to_json()["held_back"])
    publisher("five")
    assert (apply(prefix, publisher)[0].release.version, ask(prefix)) == (5, "five")


def test_only_releases_that_a_device_may_take_stay_in_the_repository(publisher: Publisher) -> None:
    listed = []
    for answer, options in (
        ("one", {}),
        ("two", {"share": 0.1}),
        ("two", {"share": 0.5}),
        ("three", {"share": 0.1, "min_runtime": "0.0.1"}),
        ("three", {"min_runtime": "0.0.1"}),
        ("four", {}),
    ):
        publisher(answer, **options)
        newest = max((publisher.repo / "targets/home").glob("*.stable.json"), key=lambda path: path.stat().st_mtime_ns)
        listed.append(parse_release(newest.read_bytes()).older)
    assert listed == [(), (1,), (1,), (3, 1), (3, 1), ()]
    metadata = json.loads((publisher.repo / "metadata/6.bundle-home.json").read_text())
    assert list(metadata["signed"]["targets"]) == ["home/stable.json"]
