from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from damage import flip
from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import MANIFEST_NAME, parse_manifest, sha256_of
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME, require_signed
from edgetune_runtime.errors import (
    EdgetuneError,
    IncompatibleError,
    NotFoundError,
    OutOfSpaceError,
    UsageError,
    VerificationError,
)
from edgetune_runtime.update import release
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.release import Release
from edgetune_runtime.update.trust import TrustedRepository
from filelock import FileLock
from kills import full_from, left_by_kills, read_only_from
from kits import contents, write_bundle
from repositories import PASSPHRASE, START, Publisher, make_keys, open_keys, publish, seen_by_device, with_adapters
from runtime.bundles import add_router
from securesystemslib.signer import Key, Signer

from edgetune.cli.main import main
from edgetune.delivery.publish import key_folder, repository
from edgetune.delivery.publish.key_files import PASSPHRASE as VARIABLE
from edgetune.delivery.publish.key_folder import BUNDLES, ROOT_ROLES, KeyFolder
from edgetune.delivery.publish.publish import refresh, sign


def test_a_repository_has_each_file_once_and_a_release_per_publish(publisher: Publisher, tmp_path: Path) -> None:
    first = publisher("one")
    blobs = {path.name for path in (publisher.repo / "blobs").iterdir()}
    second = publisher("two")
    assert (first.release.version, second.release.version) == (1, 2)
    # The answer, the manifest and its signature.
    assert len({path.name for path in (publisher.repo / "blobs").iterdir()} - blobs) == 3
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device") == second.release


def test_a_bundle_that_the_channel_has_is_not_published_again(publisher: Publisher) -> None:
    first = publisher("one")
    again = publisher("one")
    assert (again.changed, again.copied_bytes, again.release) == (False, 0, first.release)


def test_a_release_that_no_device_would_read_is_not_published(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "LONGEST_RELEASE", 500)
    with pytest.raises(VerificationError, match=r"the release has \d+ bytes, and devices read up to 500; publish"):
        publisher("one")
    assert not (publisher.repo / "blobs").exists()


def test_an_adapter_is_published_alone(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, PASSPHRASE)
    bundle = with_adapters(publisher.bundle, "command", "reply")
    router = add_router(bundle, {"generate": {"command": "x", "reply": "y"}})
    first = publish(publisher.bundle, publisher.repo, publisher.keys, share=0.1, min_runtime="0.0.1").release
    words = ["publish", str(with_adapters(tmp_path / "team/home", "reply")), "--keys", str(publisher.keys.folder)]
    words += ["--repo", str(publisher.repo), "--quiet", "--adapter"]
    assert main([*words, "command"]) == NotFoundError.exit_code
    assert main([*words, "reply", "--channel", "beta"]) == NotFoundError.exit_code
    assert main([*words, "reply"]) == 0
    release = seen_by_device(publisher.repo, publisher.root, tmp_path / "device")
    changed = {path for path in {*first.files, *release.files} if first.files.get(path) != release.files.get(path)}
    assert changed == {"adapters/reply/adapter.gguf", MANIFEST_NAME, SIGNATURE_NAME}
    assert (release.share, release.min_runtime) == (0.1, "0.0.1")
    blobs = publisher.repo / "blobs"
    assert (
        blobs / release.files["adapters/reply/adapter.gguf"].sha256
    ).read_text() == f"reply of {tmp_path}/team/home: one"
    manifest = parse_manifest((blobs / release.bundle).read_bytes(), blobs)
    assert (sorted(manifest.adapters), manifest.router) == (["command", "reply"], router)
    assert all(sha256_of(path) == path.name for path in blobs.iterdir())
    assert not (publisher.repo / ".adapter").exists()
    # What somebody without keys has put in place of a manifest and of a file that it names.
    raw = json.loads((blobs / release.bundle).read_bytes())
    raw["files"]["answer.txt"] = {"sha256": hashlib.sha256(b"evil").hexdigest(), "bytes": 4}
    (blobs / release.bundle).write_text(json.dumps(raw))
    (blobs / release.files["answer.txt"].sha256).write_bytes(b"evil")
    assert main([*words, "reply"]) == VerificationError.exit_code
    publisher.formats = ["gguf", "onnx"]
    publisher("two")
    assert main([*words, "reply"]) == IncompatibleError.exit_code


def test_bundles_and_channels_are_apart(publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    other = write_bundle(tmp_path / "other.2", "three")
    publish(other, publisher.repo, publisher.keys)
    beta = publisher("two", channel="beta")
    assert beta.release.version == 2
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 1
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device", "other.2").name == "other.2"
    with pytest.raises(NotFoundError, match=r"its bundles are: home, other\.2"):
        seen_by_device(publisher.repo, publisher.root, tmp_path / "device", "another")


def test_a_publish_that_is_killed_at_any_write_leaves_a_valid_repository(publisher: Publisher, tmp_path: Path) -> None:
    one = publisher("one").release
    write_bundle(publisher.bundle, "two")
    versions = []

    def action() -> int:
        publish(publisher.bundle, publisher.repo, publisher.keys)
        return 0

    for number, _ in enumerate(left_by_kills(action, publisher.repo)):
        versions.append(seen_by_device(publisher.repo, publisher.root, tmp_path / f"device-{number}").version)
        action()
        assert seen_by_device(publisher.repo, publisher.root, tmp_path / f"device-{number}").version == 2
    assert len(versions) > 15 and one.version == 1
    assert versions == sorted(versions) and set(versions) == {1, 2}


@pytest.mark.parametrize("failing", [full_from, read_only_from])
def test_a_publish_that_cannot_write_any_more_leaves_a_valid_repository(
    failing: Callable[..., int], publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, PASSPHRASE)
    publisher("one")
    write_bundle(publisher.bundle, "two")
    kept, before, states, versions = tmp_path / "kept", contents(publisher.repo), [], []
    shutil.copytree(publisher.repo, kept)
    words = ["publish", str(publisher.bundle), "--repo", str(publisher.repo), "--keys", str(publisher.keys.folder)]
    for write in range(1, 200):
        shutil.rmtree(publisher.repo)
        shutil.copytree(kept, publisher.repo)
        code = failing(write, lambda: main(words))
        # New metadata has the time in it, so that of two runs differs in all but its size.
        left = sorted((name, len(data), data == before.get(name)) for name, data in contents(publisher.repo).items())
        if left not in states:
            states.append(left)
            versions.append(seen_by_device(publisher.repo, publisher.root, tmp_path / f"device-{write}").version)
            assert main(words) == 0
        if code == 0:
            break
        assert code == (OutOfSpaceError if failing is full_from else UsageError).exit_code
    assert write > 15
    assert versions == sorted(versions) and set(versions) == {1, 2}


def test_two_publishes_at_once_are_refused(publisher: Publisher) -> None:
    with FileLock(publisher.repo / ".lock"), pytest.raises(UsageError, match="another publish is using"):
        publisher("one")
    assert publisher("one").changed


def blobs_of(release: Release) -> set[str]:
    return {entry.sha256 for entry in release.files.values()}


def test_releases_that_are_not_kept_are_deleted_with_the_files_that_only_they_need(
    publisher: Publisher, tmp_path: Path
) -> None:
    releases = [publisher(answer).release for answer in ("one", "two", "three")]
    beta = publisher("beta", channel="beta").release
    done = publisher("four", keep=2)
    blobs = {path.name for path in (publisher.repo / "blobs").iterdir()}
    assert blobs == blobs_of(releases[2]) | blobs_of(done.release) | blobs_of(beta)
    assert len(list(publisher.repo.glob("targets/home/*.json"))) == 3
    assert done.deleted_bytes > sum(entry.bytes for entry in releases[0].files.values()) - len(b"weights")
    (publisher.repo / "blobs/@eaDir").mkdir()
    assert publisher("four", keep=2).deleted_bytes == 0
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device") == done.release
    # What a device was downloading is there until the next but one release.
    refresh(publisher.repo, publisher.keys, expires_days=30, keep=1)
    # A share's own folder stays.
    (publisher.repo / "blobs/@eaDir").rmdir()
    assert {path.name for path in (publisher.repo / "blobs").iterdir()} == blobs_of(done.release) | blobs_of(beta)


def test_deleting_old_releases_can_be_killed_at_any_write(publisher: Publisher, tmp_path: Path) -> None:
    for answer in ("one", "two", "three"):
        publisher(answer)
    (publisher.repo / "targets/home/junk.json").write_text("[]")
    (publisher.repo / "blobs/.tmp").write_text("cut off")
    write_bundle(publisher.bundle, "four")
    number = 0

    def action() -> int:
        publish(publisher.bundle, publisher.repo, publisher.keys, keep=1)
        return 0

    for number, _ in enumerate(left_by_kills(action, publisher.repo), 1):
        release = seen_by_device(publisher.repo, publisher.root, tmp_path / f"device-{number}")
        assert blobs_of(release) <= {path.name for path in (publisher.repo / "blobs").iterdir()}
        action()
        release = seen_by_device(publisher.repo, publisher.root, tmp_path / f"device-{number}")
        assert {path.name for path in (publisher.repo / "blobs").iterdir()} == blobs_of(release)
        assert len(list((publisher.repo / "targets/home").iterdir())) == 1
    assert number > 20


@pytest.mark.parametrize("role", [*ROOT_ROLES, BUNDLES])
def test_devices_follow_a_new_key_whenever_publishing_it_is_killed(role: str, tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    publisher("one")
    seen_by_device(publisher.repo, publisher.root, tmp_path / "device")
    publisher.keys.rotate(role)
    number = 0

    def action() -> int:
        refresh(publisher.repo, publisher.keys, expires_days=30)
        return 0

    for number, _ in enumerate(left_by_kills(action, publisher.repo), 1):
        device = shutil.copytree(tmp_path / "device", tmp_path / f"device-{number}", symlinks=True)
        assert seen_by_device(publisher.repo, publisher.root, device).version == 1
    assert number > 5
    assert publisher("two").release == seen_by_device(publisher.repo, publisher.root, tmp_path / "device")


def test_a_root_that_appears_after_its_timestamp_is_followed_at_the_next_look(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher("one")
    publisher.keys.rotate("targets")
    refresh(publisher.repo, publisher.keys, expires_days=30)
    root, device = publisher.repo / "metadata/2.root.json", tmp_path / "device"
    root.rename(tmp_path / "late")
    seen_by_device(publisher.repo, publisher.root, device)
    assert [path.name for path in (device / "root_history").iterdir()] == ["1.root.json"]
    (tmp_path / "late").rename(root)
    seen_by_device(publisher.repo, publisher.root, device)
    assert (device / "root_history/2.root.json").read_bytes() == root.read_bytes()


@pytest.mark.parametrize(
    "name",
    [*(f"{role}.json" for role in ("timestamp", "snapshot", "targets", "bundle-home", "release")),
     "root_history/2.root.json"],
)  # fmt: skip
@pytest.mark.parametrize("place", [0.0, 0.3, 0.9])
def test_metadata_that_was_damaged_on_a_device_is_read_again(
    name: str, place: float, publisher: Publisher, tmp_path: Path
) -> None:
    publisher("one")
    publisher.keys.rotate("timestamp")
    release = publisher("two").release
    device = tmp_path / "device"
    seen_by_device(publisher.repo, publisher.root, device)
    flip(device / name, place, bit=2)
    assert seen_by_device(publisher.repo, publisher.root, device) == release


def test_a_lost_or_stolen_key_is_replaced_with_the_root_keys(publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    (stolen,) = publisher.keys.folder.glob("timestamp-*.pem")
    thief = tmp_path / "thief"
    shutil.copytree(publisher.keys.folder, thief)
    forged = tmp_path / "forged"
    shutil.copytree(publisher.repo, forged)
    stolen.unlink()
    with pytest.raises(NotFoundError, match="private keys of timestamp are not in"):
        refresh(publisher.repo, publisher.keys, expires_days=30)
    publisher.keys.rotate("timestamp")
    publisher("two")
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 2
    # The thief has no root key that devices trust.
    publish(write_bundle(publisher.bundle, "evil"), forged, open_keys(thief))
    with pytest.raises(VerificationError, match="is refused"):
        seen_by_device(forged, publisher.root, tmp_path / "device")


def test_a_root_key_can_be_lost_where_fewer_must_sign(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", root_keys=3, threshold=2)
    bundle, repo = write_bundle(tmp_path / "home", "one"), tmp_path / "repo"
    publish(bundle, repo, keys)
    lost = keys.keys("root")[0].keyid
    next(keys.folder.glob(f"root-{lost[:8]}.pem")).unlink()
    keys.rotate("root")
    publish(bundle, repo, keys)
    assert seen_by_device(repo, keys.folder / "1.root.json", tmp_path / "device").version == 1
    for path in list(keys.folder.glob("root-*.pem"))[1:]:
        path.unlink()
    before = {path.name for path in keys.folder.iterdir()}
    with pytest.raises(UsageError, match=r"1 private root keys are in .*, and 2 must sign"):
        keys.add("targets")
    assert {path.name for path in keys.folder.iterdir()} == before


def test_the_last_key_of_a_role_cannot_be_revoked(publisher: Publisher) -> None:
    (key,) = publisher.keys.keys("snapshot")
    with pytest.raises(UsageError, match="snapshot needs 1 keys, and 0 would be left"):
        publisher.keys.revoke(key.keyid[:10])
    publisher.keys.add("snapshot")
    assert publisher.keys.revoke(key.keyid[:10]) == "snapshot"
    assert key.keyid not in {item.keyid for item in publisher.keys.keys("snapshot")}
    with pytest.raises(NotFoundError, match="0 keys"):
        publisher.keys.revoke("nothing")


@pytest.fixture
def team(publisher: Publisher, tmp_path: Path) -> KeyFolder:
    """The keys of a team that publishes "home"; somebody else has those of other bundles, of targets and the root."""
    publish(write_bundle(tmp_path / "other", "one"), publisher.repo, publisher.keys)
    publisher.keys.add("bundles/home")
    publisher("one")
    folder = Path(shutil.copytree(publisher.keys.folder, tmp_path / "team"))
    for pattern in ("root-*.pem", "targets-*.pem", "bundles-????????.pem"):
        for path in folder.glob(pattern):
            path.unlink()
    return open_keys(folder)


def test_a_team_publishes_its_bundle_and_no_other(publisher: Publisher, team: KeyFolder, tmp_path: Path) -> None:
    done = publish(write_bundle(publisher.bundle, "two"), publisher.repo, team)
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device") == done.release
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device", "other").version == 1
    before = contents(publisher.repo / "metadata")
    with pytest.raises(NotFoundError, match="the private keys of bundles are not in"):
        publish(write_bundle(tmp_path / "other", "two"), publisher.repo, team)
    assert not (tmp_path / "other" / SIGNATURE_NAME).exists()
    assert contents(publisher.repo / "metadata") == before
    # Nor one of a new name, for which the role of targets must sign.
    team.add("bundles/third")
    with pytest.raises(NotFoundError, match="the private keys of targets are not in"):
        publish(write_bundle(tmp_path / "third", "one"), publisher.repo, team)
    # And who has the keys of all other bundles not this one.
    for path in publisher.keys.folder.glob("bundles-home-*.pem"):
        path.unlink()
    with pytest.raises(NotFoundError, match="the private keys of bundles/home are not in"):
        publisher("three")


def test_the_keys_of_one_bundle_sign_its_manifest(publisher: Publisher, team: KeyFolder) -> None:
    require_signed(publisher.bundle, team.trusted_keys("bundles/home"))
    with pytest.raises(VerificationError, match="is not signed by a key in"):
        require_signed(publisher.bundle, team.trusted_keys(BUNDLES))


def test_a_team_publishes_beside_an_expired_bundle_of_others(
    publisher: Publisher, team: KeyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(repository, "_TARGETS_DAYS", -1)
        publish(write_bundle(tmp_path / "other", "two"), publisher.repo, publisher.keys)
    done = publish(write_bundle(publisher.bundle, "two"), publisher.repo, team)
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device") == done.release
    refresh(publisher.repo, publisher.keys, expires_days=30)
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device", "other").version == 2


def test_a_team_does_not_renew_what_others_sign(
    publisher: Publisher, team: KeyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("2.bundle-other.json", "3.targets.json")
    monkeypatch.setattr(repository, "_TARGETS_DAYS", 10_000)
    refresh(publisher.repo, team, expires_days=30)
    assert not any((publisher.repo / "metadata" / name).exists() for name in names)
    assert (publisher.repo / "metadata/2.bundle-home.json").exists()
    refresh(publisher.repo, publisher.keys, expires_days=30)
    assert all((publisher.repo / "metadata" / name).exists() for name in names)


def test_the_keys_of_one_bundle_are_replaced_with_the_key_of_targets(
    publisher: Publisher, team: KeyFolder, tmp_path: Path
) -> None:
    seen_by_device(publisher.repo, publisher.root, tmp_path / "device")
    publisher.keys.rotate("bundles/home")
    (stolen,) = (key for key in team.keys("bundles/home"))
    assert stolen not in publisher.keys.keys("bundles/home")
    assert publisher("two").release == seen_by_device(publisher.repo, publisher.root, tmp_path / "device")
    with pytest.raises(NotFoundError, match="the private keys of targets are not in"):
        publish(write_bundle(publisher.bundle, "stolen"), publisher.repo, team)
    assert [row["role"] for row in publisher.keys.listing()][-2:] == ["bundles", "bundles/home"]


def test_a_bundle_whose_name_is_no_path_gets_no_keys(publisher: Publisher) -> None:
    with pytest.raises(UsageError, match=r"the bundle's name is '\.\.'; use up to"):
        publisher.keys.add("bundles/../x")


def test_an_expired_repository_is_valid_again_after_another_signature(publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    path = publisher.repo / "metadata/timestamp.json"
    soon = datetime.now(UTC) + timedelta(days=200)
    trusted = TrustedRepository(Location(str(publisher.repo)), tmp_path / "late", publisher.root.read_bytes(), START)
    trusted._updater._trusted_set.reference_time = soon
    with pytest.raises(VerificationError, match=r"is expired.* sign it again"):
        trusted.refresh()
    before = path.read_bytes()
    refresh(publisher.repo, publisher.keys, expires_days=30)
    assert path.read_bytes() != before
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 1


def test_a_time_beyond_the_calendar_is_refused_before_anything_is_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["publish", str(tmp_path), "--repo", str(tmp_path / "repo"), "--keys", str(tmp_path)]
    assert main([*words, "--expires-days", "4000000"]) == 2
    assert "--expires-days is '4000000', not a number of at most 36500" in capsys.readouterr().err
    assert not (tmp_path / "repo").exists()


def test_signing_again_makes_no_repository(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, PASSPHRASE)
    mistyped = tmp_path / "nope"
    assert main(["publish", "--repo", str(mistyped), "--keys", str(publisher.keys.folder)]) == NotFoundError.exit_code
    message = f"{mistyped} is not a repository; check --repo, or publish a bundle to make one"
    assert message in capsys.readouterr().err
    assert not mistyped.exists()


def test_signing_again_speaks_json(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, PASSPHRASE)
    publisher("one")
    words = ["publish", "--repo", str(publisher.repo), "--keys", str(publisher.keys.folder), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(publisher.repo)}


def test_an_expired_root_is_followed_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_folder, "_ROOT_DAYS", -1)
    publisher = Publisher(tmp_path)
    with pytest.raises(UsageError, match=r"expired on .*; sign the next one: edgetune keys rotate"):
        publisher("one")
    others = Path(shutil.copytree(publisher.keys.folder, tmp_path / "others", ignore=shutil.ignore_patterns("root-*")))
    with pytest.raises(UsageError, match=r"expired on .*; copy the next \*\.root\.json from whoever has the root keys"):
        publish(publisher.bundle, publisher.repo, open_keys(others))
    monkeypatch.undo()
    publisher.keys.rotate("root")
    publisher("one")
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 1


class TomorrowWeek(datetime):
    """A clock that is eight days ahead."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> TomorrowWeek:
        return cls.fromtimestamp(datetime.now(tz).timestamp() + 8 * 86_400, tz)


def test_a_root_that_was_made_with_a_wrong_clock_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_folder, "datetime", TomorrowWeek)
    publisher = Publisher(tmp_path)
    with pytest.raises(UsageError, match=r"was made on 20..-..-.., which is still to come; set this machine's clock"):
        publisher("one")
    monkeypatch.undo()
    publisher.keys.rotate("root")
    publisher("one")
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 1


def test_a_bundle_that_was_published_can_be_built_again(publisher: Publisher) -> None:
    publisher("one")
    check_destination(publisher.bundle)


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "1.bundle-home.json"])
def test_what_somebody_else_put_into_a_repository_is_not_signed(name: str, publisher: Publisher) -> None:
    publisher("one")
    path = publisher.repo / "metadata" / name
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(VerificationError, match="not signed by the keys"):
        publisher("two")


def test_a_repository_whose_copy_was_cut_off_is_not_taken_for_a_new_one(publisher: Publisher) -> None:
    for answer in ("one", "two"):
        publisher(answer)
    timestamp = publisher.repo / "metadata/timestamp.json"
    timestamp.unlink()
    with pytest.raises(VerificationError, match=r"timestamp\.json is missing; restore the repository from a backup"):
        publisher("three")
    assert not timestamp.exists()


def test_what_killed_publishes_have_left_is_deleted(publisher: Publisher) -> None:
    publisher("one")
    left = [publisher.repo / name / ".12ba.tmp-34cd" for name in ("blobs", "metadata", "targets/home")]
    for path in left:
        path.write_text("half of a file")
    (publisher.repo / "blobs/.folder.tmp-12").mkdir()
    publisher("two")
    assert not any(path.exists() for path in left)


def test_a_pipe_in_a_repository_is_not_waited_for(publisher: Publisher) -> None:
    publisher("one")
    os.mkfifo(publisher.repo / "targets/home/x.json")
    publisher("two", keep=1)
    path = publisher.repo / "metadata/2.snapshot.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(VerificationError, match=r"2\.snapshot\.json is not a regular file"):
        publisher("three")


def test_the_keys_of_another_repository_are_refused(publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    with pytest.raises(UsageError, match="is not the one in"):
        publish(publisher.bundle, publisher.repo, make_keys(tmp_path / "others"))


def keys_with(tmp_path: Path, damage: str) -> KeyFolder:
    keys = make_keys(tmp_path / "keys")
    (path,) = keys.folder.glob("bundles-*.pem")
    if damage == "rights":
        path.chmod(0o640)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:100])
    if damage == "other":
        (other,) = keys.folder.glob("snapshot-*.pem")
        shutil.copy(other, path)
    return keys if damage != "passphrase" else KeyFolder(keys.folder, lambda: "wrong horse")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("rights", r"others may read .* \(mode 0640\); run: chmod 600"),
        ("bytes", "the passphrase does not open .*, or the file is damaged"),
        ("passphrase", "the passphrase does not open"),
        ("other", "is not the private key"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_refused_in_one_line(damage: str, problem: str, tmp_path: Path) -> None:
    keys = keys_with(tmp_path, damage)
    with pytest.raises(EdgetuneError, match=problem) as caught:
        publish(write_bundle(tmp_path / "home", "one"), tmp_path / "repo", keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "repo/metadata/timestamp.json").exists()


def test_private_keys_are_encrypted_and_readable_for_their_owner_only(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", root_keys=2)
    files = list(keys.folder.glob("*.pem"))
    assert len(files) == 6
    assert all(b"ENCRYPTED" in path.read_bytes() and path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_the_commands_make_list_and_replace_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, PASSPHRASE)
    keys = str(tmp_path / "keys")
    assert main(["keys", "init", keys, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["role"] for row in rows] == ["root", "root", "root", "targets", "snapshot", "timestamp", "bundles"]
    assert {row["threshold"] for row in rows if row["role"] == "root"} == {2}
    assert main(["keys", "rotate", keys, "bundles"]) == 0
    assert main(["keys", "add", keys, "timestamp"]) == 0
    assert main(["keys", "revoke", keys, rows[-2]["key"][:8]]) == 0
    capsys.readouterr()
    assert main(["keys", "list", keys, "--json"]) == 0
    after = {row["key"] for row in json.loads(capsys.readouterr().out)}
    assert {row["key"] for row in rows} - after == {rows[-1]["key"], rows[-2]["key"]}
    assert main(["keys", "rotate", keys, "bundle"]) == 2
    assert "did you mean 'bundles'?" in capsys.readouterr().err
    assert main(["keys", "init", keys]) == 2
    for passphrase in ("corect horse", ""):
        monkeypatch.setenv(VARIABLE, passphrase)
        for command in ("add", "rotate"):
            assert main(["keys", command, keys, "bundles"]) == 2
            assert f"the passphrase opens no private key in {keys}; correct" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(keys, copy, ignore=shutil.ignore_patterns("*.pem"))
    assert main(["keys", "add", str(copy), "bundles/home"]) == 2
    assert "the passphrase has 0 characters; use 8 or more" in capsys.readouterr().err
    monkeypatch.delenv(VARIABLE)
    bundle = str(write_bundle(tmp_path / "home", "one"))
    assert main(["publish", bundle, "--repo", str(tmp_path / "repo"), "--keys", keys]) == 2
    assert f"set {VARIABLE}" in capsys.readouterr().err


def test_a_copy_of_a_root_under_another_name_is_not_read(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    for name in ("backup.root.json", "3.old.root.json"):
        shutil.copy(keys.roots[0], keys.folder / name)
    keys.rotate("snapshot")
    assert [path.name for path in keys.roots] == ["1.root.json", "2.root.json"]


def test_two_changes_of_keys_at_once_do_not_replace_each_other(tmp_path: Path) -> None:
    others = make_keys(tmp_path / "keys")

    class Interrupted(KeyFolder):
        def signers(self, role: str, keys: Iterable[Key]) -> list[Signer]:
            others.rotate("timestamp")
            return super().signers(role, keys)

    with pytest.raises(UsageError, match=r"another command has written .*2\.root\.json; run this one again"):
        Interrupted(others.folder, lambda: PASSPHRASE).rotate("snapshot")
    assert len(list(others.folder.glob("timestamp-*.pem"))) == 2
    assert len(list(others.folder.glob("snapshot-*.pem"))) == 1


def test_a_key_that_is_revoked_while_another_is_made_stays_revoked(tmp_path: Path) -> None:
    others = make_keys(tmp_path / "keys")
    others.add(BUNDLES)
    first, second = others.keys(BUNDLES)

    def passphrase() -> str:
        if others.keys(BUNDLES) == [first, second]:
            others.revoke(first.keyid)
        return PASSPHRASE

    keys = KeyFolder(others.folder, passphrase)
    with pytest.raises(UsageError, match=r"another command has written .*trusted-keys\.json; run this one again"):
        keys.add(BUNDLES)
    assert others.keys(BUNDLES) == [second]
    assert len(list(others.folder.glob(f"{BUNDLES}-*.pem"))) == 2
    keys.add(BUNDLES)
    assert len(others.keys(BUNDLES)) == 2


def test_a_bundle_is_trusted_by_the_keys_that_signed_it(tmp_path: Path) -> None:
    keys, others = make_keys(tmp_path / "keys"), make_keys(tmp_path / "others")
    bundle, trusted = write_bundle(tmp_path / "home", "one"), keys.trusted_keys(BUNDLES)
    with pytest.raises(VerificationError, match=f"is not signed: it has no {SIGNATURE_NAME}"):
        require_signed(bundle, trusted)
    sign(bundle, keys)
    require_signed(bundle, trusted)
    with pytest.raises(VerificationError, match="is not signed by a key in"):
        require_signed(bundle, others.trusted_keys(BUNDLES))
    manifest = bundle / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b'"home"', b'"hame"'))
    with pytest.raises(VerificationError, match="or its manifest was changed"):
        require_signed(bundle, trusted)
    (bundle / SIGNATURE_NAME).write_text("{}")
    with pytest.raises(VerificationError, match="is damaged"):
        require_signed(bundle, trusted)
