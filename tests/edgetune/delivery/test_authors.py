from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from edgetune_export.pack import check_destination, pack
from edgetune_runtime.bundle import MANIFEST_NAME, parse_manifest, read_manifest, verify_files
from edgetune_runtime.bundle.parts import identity_in, part_path
from edgetune_runtime.bundle.signatures import read_signed_manifest
from edgetune_runtime.errors import (
    EdgetuneError,
    IncompatibleError,
    NotFoundError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from edgetune_runtime.inference.bundle_files import remove_from_bundle
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.release import Release, path_of_part
from edgetune_runtime.update.trust import TrustedRepository
from kills import left_by_kills
from kits import write_bundle
from repositories import (
    PASSPHRASE,
    START,
    Publisher,
    author_of,
    keys_of_author,
    open_keys,
    publish,
    publish_part,
    seen_by_device,
    sign_as_author,
    with_adapters,
)
from tuf.api.metadata import DelegatedRole, Delegations

from edgetune.cli.main import main
from edgetune.common.progress import Progress
from edgetune.delivery.oci.release_metadata import TrustedChannel
from edgetune.delivery.oci.transfer import open_store, pull, push
from edgetune.delivery.publish import repository
from edgetune.delivery.publish.key_files import PASSPHRASE as VARIABLE
from edgetune.delivery.publish.key_folder import BUNDLES, KeyFolder
from edgetune.delivery.publish.publish import refresh
from edgetune.delivery.publish.repository import Repository
from edgetune.shipping.existing import ExistingBundle

PART, FILE = part_path("reply"), "authors/reply/adapter.gguf"


@pytest.fixture
def author(publisher: Publisher, tmp_path: Path) -> KeyFolder:
    return author_of(publisher, tmp_path / "author-keys")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The bundle of the author, with nothing but this adapter."""
    return with_adapters(tmp_path / "author/home", "reply")


def seen(publisher: Publisher, device: str = "device") -> Release:
    return seen_by_device(publisher.repo, publisher.root, publisher.repo.parent / device)


def composed(publisher: Publisher, release: Release, folder: Path) -> Path:
    """The folder of a bundle with the files of a release."""
    for path, entry in release.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(publisher.repo / "blobs" / entry.sha256, folder / path)
    return folder


def test_an_author_publishes_an_adapter_and_nothing_else(
    publisher: Publisher,
    author: KeyFolder,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(VARIABLE, PASSPHRASE)
    owners = seen(publisher)
    words = ["publish", str(work), "--keys", str(author.folder), "--repo", str(publisher.repo), "--adapter", "reply"]
    capsys.readouterr()
    assert main([*words, "--share", "0.5"]) == UsageError.exit_code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([*words, "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert (reply["adapter"], reply["part"], reply["changed"]) == ("reply", 1, True)
    release = seen(publisher)
    assert reply["bundle"] == release.bundle != owners.bundle
    assert {path: release.files[path] for path in owners.files} == owners.files
    assert {*release.files} - {*owners.files} == {PART, "authors/reply/adapter.gguf"}
    bundle = composed(publisher, release, tmp_path / "home-of-device")
    manifest = read_signed_manifest(bundle, publisher.keys.trusted_keys(BUNDLES))
    verify_files(bundle, manifest)
    assert list(manifest.adapters) == ["command", "reply"]
    before = parse_manifest((bundle / MANIFEST_NAME).read_bytes(), bundle)
    assert manifest.adapter("command") == before.adapter("command")
    assert manifest.adapter("reply").files == {"gguf": "authors/reply/adapter.gguf"}
    assert "adapters/reply/adapter.gguf" not in manifest.files
    # The same adapter again, and another one; a release of the owner keeps it.
    assert main(words) == 0
    assert "part 1 of reply for home version 1 in stable was published already" in capsys.readouterr().out
    with_adapters(work, "reply", answer="two")
    assert publish_part(work, publisher.repo, author).part == 2
    publish(with_adapters(publisher.bundle, "command", "reply", answer="two"), publisher.repo, publisher.keys)
    assert (seen(publisher).version, PART in seen(publisher).files) == (2, True)
    # Whatever else the author publishes needs other keys.
    both, asking = str(with_adapters(tmp_path / "both/home", "command", "reply")), "bundles/home/command"
    for changed, problem in (
        ([*words[:-1], "command"], "no adapter 'command'"),
        (
            ["publish", both, *words[2:-1], "command"],
            f"{author.folder} has no private key of bundles, and none of {asking}; make one, edgetune keys add "
            f"{author.folder} {asking}, and ask its owner to add yours, edgetune keys add KEYS {asking} "
            "--public-key FILE, and to publish the bundle",
        ),
        (words[:-2], "as the author of bundles/home/reply, publish with --adapter reply"),
    ):
        assert main(changed) == NotFoundError.exit_code
        assert problem in capsys.readouterr().err


def test_what_does_not_fit_the_release_is_not_published(
    publisher: Publisher, author: KeyFolder, work: Path, tmp_path: Path
) -> None:
    before = seen(publisher)
    with pytest.raises(NotFoundError, match="has no release of 'home' in the channel 'beta'"):
        publish_part(work, publisher.repo, author, channel="beta")
    other = json.loads((work / MANIFEST_NAME).read_text().replace("ab" * 32, "cd" * 32))
    (work / MANIFEST_NAME).write_text(json.dumps(other))
    with pytest.raises(IncompatibleError, match="was made for another base than release 1 has"):
        publish_part(work, publisher.repo, author)
    # A key that the owner has not granted, and one that was published without the bundle.
    author.rotate("bundles/home/reply")
    publisher.keys.folder.joinpath("trusted-keys-home~reply.json").write_bytes(
        author.trusted_keys("bundles/home/reply").read_bytes()
    )
    for _ in range(2):
        with pytest.raises(
            NotFoundError, match=r"none of the private keys of bundles/home/reply here; ask its owner to"
        ):
            publish_part(with_adapters(tmp_path / "new/home", "reply"), publisher.repo, author)
        refresh(publisher.repo, publisher.keys, expires_days=30)
    assert seen(publisher) == before


def test_a_role_of_an_author_signs_no_other_path(
    publisher: Publisher, author: KeyFolder, work: Path, tmp_path: Path
) -> None:
    publish(write_bundle(tmp_path / "other", "one"), publisher.repo, publisher.keys)
    publish_part(work, publisher.repo, author)
    before = seen(publisher)

    def release_of_all(repository: Repository, role: str) -> None:
        for name in ("home", "other"):
            evil = replace(before, name=name, version=9, share=1.0).to_json().encode()
            repository.put_release(role.removeprefix("bundle-"), f"{name}/stable.json", evil, 9)

    sign_as_author(publisher, author, release_of_all)
    assert seen(publisher) == before
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "other-device", "other").version == 1
    # Nor is it signed again.
    with pytest.raises(VerificationError, match=r"has 'home/stable\.json', which this role may not sign"):
        publish(publisher.bundle, publisher.repo, publisher.keys)
    # Who signs such things loses the key.
    (key,) = publisher.keys.keys("bundles/home/reply")
    publisher.keys.revoke(key.keyid)
    publish(publisher.bundle, publisher.repo, publisher.keys, keep=1)
    assert (seen(publisher).version, PART in seen(publisher).files) == (2, False)


def test_a_role_of_an_author_delegates_to_nobody(publisher: Publisher, author: KeyFolder, work: Path) -> None:
    publish_part(work, publisher.repo, author)
    (key,) = author.keys("bundles/home/reply")

    def delegate(repository: Repository, role: str) -> None:
        # python-tuf would keep what this key signs for "bundle-home" as the metadata of the bundle.
        repository.put_release(role.removeprefix("bundle-"), path_of_part(role, "beta"), b"", 1)
        evil = DelegatedRole("bundle-home", [key.keyid], 1, terminating=True, paths=["home/*"])
        repository._roles[role].delegations = Delegations({key.keyid: key}, {"bundle-home": evil})

    sign_as_author(publisher, author, delegate)
    with pytest.raises(VerificationError, match="delegates to others"):
        seen(publisher)
    with pytest.raises(VerificationError, match="has 'delegations', which this role may not sign"):
        publish(publisher.bundle, publisher.repo, publisher.keys)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"authors/reply/adapter.gguf"', '"adapters/command/adapter.gguf"', "which is not its own"),
        ('"authors/reply/adapter.gguf"', '"authors/reply/../../x"', "outside the bundle"),
        ('"authors/reply/adapter.gguf"', f'"authors/reply/{"a/" * 10**5}x"', "which is too long"),
        ('"authors/reply/adapter.gguf"', '"authors/reply/part.json"', "which is not its own"),
        ('"authors/reply/adapter.gguf"', '"authors/reply/part.json/a"', "which is not its own"),
        (
            '"files": {\n   "authors',
            f'"files": {{"{FILE}/a": {{"sha256": "{"0" * 64}", "bytes": 1}}, "authors',
            "its own",
        ),
        ('"bundle": "home"', '"bundle": "other"', "it is of 'reply' in 'other'"),
        ('"name": "reply"', '"name": "command"', "which is not its own"),
        ('"sha256": "', '"sha256": "../', "is damaged"),
        ('"schema": 1', '"schema": 2', "has schema 2, this runtime reads 1"),
        ('"part": {', '"part": [{', "is damaged"),
    ],
)
def test_a_part_that_names_more_than_its_adapter_is_refused_by_devices(
    old: str, new: str, problem: str, publisher: Publisher, author: KeyFolder, work: Path
) -> None:
    publish_part(work, publisher.repo, author)

    def change(repository: Repository, role: str) -> None:
        path = path_of_part(role, "stable")
        name = role.removeprefix("bundle-")
        text = repository.read_release(repository.releases(name)[path]).decode()
        assert old in text
        repository.put_release(name, path, text.replace(old, new).encode(), 2)

    sign_as_author(publisher, author, change)
    with pytest.raises(EdgetuneError, match=problem) as raised:
        seen(publisher)
    assert len(str(raised.value).splitlines()) == 1


def test_a_publish_of_an_author_that_is_killed_at_any_write_leaves_a_valid_repository(
    publisher: Publisher, author: KeyFolder, work: Path
) -> None:
    parts = []

    def action() -> int:
        publish_part(work, publisher.repo, author, keep=1)
        return 0

    for number, _ in enumerate(left_by_kills(action, publisher.repo)):
        parts.append(PART in seen(publisher, f"device-{number}").files)
        action()
        after = seen(publisher, f"device-{number}")
        assert PART in after.files
        assert all((publisher.repo / "blobs" / entry.sha256).is_file() for entry in after.files.values())
    assert (parts[0], parts[-1], parts == sorted(parts)) == (False, True, True)


def test_devices_go_back_to_the_adapter_of_the_owner_when_the_key_is_revoked(
    publisher: Publisher, author: KeyFolder, work: Path, tmp_path: Path
) -> None:
    publish_part(work, publisher.repo, author)
    assert PART in seen(publisher).files
    stale = open_keys(Path(shutil.copytree(publisher.keys.folder, tmp_path / "stale-keys")))
    (key,) = publisher.keys.keys("bundles/home/reply")
    publisher.keys.revoke(key.keyid)
    assert publisher.keys.authors("home") == {}
    publish(publisher.bundle, publisher.repo, publisher.keys, keep=1)
    after = seen(publisher)
    assert (PART in after.files, after.version) == (False, 2)
    assert read_manifest(publisher.bundle).authors == {}
    for device in ("device", "new-device"):
        with pytest.raises(NotFoundError, match="allows none of the private keys"):
            publish_part(with_adapters(work, "reply", answer="two"), publisher.repo, author)
        assert seen(publisher, device) == after
    # Nor does the owner bring back what the author has published, with a copy of the keys from before.
    with pytest.raises(UsageError, match="has a key of bundles/home/reply that was revoked"):
        refresh(publisher.repo, stale, expires_days=30)
    assert seen(publisher) == after
    # Another key of the author, whose parts begin anew.
    again = keys_of_author(publisher, tmp_path / "new-keys")
    publish(publisher.bundle, publisher.repo, publisher.keys)
    assert PART not in seen(publisher).files
    assert publish_part(work, publisher.repo, again).part == 1
    assert seen(publisher, "new-device") == seen(publisher)
    assert PART in seen(publisher).files


def text_on_devices(publisher: Publisher) -> str:
    """The adapter "reply" that devices get."""
    return (publisher.repo / "blobs" / seen(publisher).files["authors/reply/adapter.gguf"].sha256).read_text()


def test_the_newest_part_of_two_keys_counts_and_one_for_another_base_waits(
    publisher: Publisher, author: KeyFolder, work: Path, tmp_path: Path
) -> None:
    publish_part(work, publisher.repo, author)
    second = keys_of_author(publisher, tmp_path / "second-keys")
    third = keys_of_author(publisher, tmp_path / "third-keys", "command")
    (old,) = author.folder.glob("bundles-home-reply-*.pem")
    shutil.copy(old, second.folder)
    publish(publisher.bundle, publisher.repo, publisher.keys)
    publish_part(with_adapters(tmp_path / "third/home", "command"), publisher.repo, third, "command")
    # The same adapter, for the newer key, and then another one from a folder that has the older key only.
    again = publish_part(work, publisher.repo, second)
    assert (again.changed, again.part, again.release) == (True, 2, seen(publisher))
    with_adapters(work, "reply", answer="three")
    assert publish_part(work, publisher.repo, author).part == 3
    assert text_on_devices(publisher).endswith("three")
    with_adapters(work, "reply", answer="two")
    assert publish_part(work, publisher.repo, second).part == 4
    # It is signed by the newer key, so the older one is no longer needed.
    publisher.keys.revoke(author.keys("bundles/home/reply")[0].keyid)
    publish(publisher.bundle, publisher.repo, publisher.keys)
    assert text_on_devices(publisher).endswith("two")
    # The owner moves to another base.
    other = (publisher.bundle / MANIFEST_NAME).read_text().replace("ab" * 32, "cd" * 32)
    (publisher.bundle / MANIFEST_NAME).write_text(other)
    publish(publisher.bundle, publisher.repo, publisher.keys)
    assert PART not in seen(publisher).files
    (work / MANIFEST_NAME).write_text((work / MANIFEST_NAME).read_text().replace("ab" * 32, "cd" * 32))
    assert publish_part(work, publisher.repo, second).part == 5
    assert PART in seen(publisher).files


def test_an_author_with_older_keys_does_not_undo_a_change_of_them(
    publisher: Publisher, author: KeyFolder, work: Path, tmp_path: Path
) -> None:
    publisher.keys.rotate("timestamp")
    publish(publisher.bundle, publisher.repo, publisher.keys)
    with pytest.raises(UsageError, match=r"has root 2, and .* only 1"):
        publish_part(work, publisher.repo, author)
    for path in (*publisher.keys.folder.glob("*.root.json"), *publisher.keys.folder.glob("timestamp-*.pem")):
        shutil.copy(path, author.folder)
    assert publish_part(work, publisher.repo, open_keys(author.folder)).part == 1
    assert PART in seen(publisher).files


def test_a_timestamp_of_the_future_does_not_set_the_time_of_a_device_whose_clock_is_right(
    publisher: Publisher, author: KeyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, after = datetime.now(UTC), repository._after
    monkeypatch.setattr(repository, "_after", lambda days: after(days + 20_000))
    refresh(publisher.repo, author, expires_days=1)
    known = START
    for wrong_days, issued_days in ((0, 0), (0.5, 0), (9, 20_000)):
        known += timedelta(days=wrong_days)
        root = publisher.root.read_bytes()
        trusted = TrustedRepository(Location(str(publisher.repo)), tmp_path / "device", root, known)
        trusted.refresh()
        known = trusted.issued
        assert (known - now + timedelta(hours=1)).days == issued_days


def test_a_server_without_the_metadata_of_an_author_does_not_take_the_part_away(
    publisher: Publisher, author: KeyFolder, work: Path
) -> None:
    publish_part(work, publisher.repo, author)
    (path,) = (publisher.repo / "metadata").glob("1.bundle-home~reply~*.json")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"reply", b"repli"))
    with pytest.raises(VerificationError, match="is refused"):
        seen(publisher)
    path.unlink()
    with pytest.raises((VerificationError, UnreachableError)):
        seen(publisher)


def test_keys_of_authors_are_listed_imported_and_limited(
    publisher: Publisher, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, PASSPHRASE)
    theirs = open_keys(Path(shutil.copytree(publisher.keys.folder, tmp_path / "theirs")))
    theirs.add("bundles/home/re.ply-2")
    (key,) = theirs.keys("bundles/home/re.ply-2")
    pem = tmp_path / "author.pem"
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.to_dict()["keyval"]["public"]))
    pem.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    folder = str(publisher.keys.folder)
    assert main(["keys", "add", folder, "bundles/home", "--public-key", str(pem)]) == UsageError.exit_code
    add = ["keys", "add", folder, "bundles/home/re.ply-2"]
    capsys.readouterr()
    assert main([*add, "--public-key", str(pem), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert (row["role"], row["key"], row["is_here"]) == ("bundles/home/re.ply-2", key.keyid, False)
    assert main([*add, "--public-key", str(pem)]) == UsageError.exit_code
    # The bundle "home" keeps the keys of all bundles.
    assert publisher.keys.role_of("home") == BUNDLES
    for wrong in ("bundles/home/..", "bundles/home/a/b", f"bundles/home/{'a' * 61}", "bundles/~/x"):
        with pytest.raises(UsageError, match="name is"):
            publisher.keys.add(wrong)
    monkeypatch.setattr("edgetune.delivery.publish.key_folder.MOST_AUTHORS", 1)
    with pytest.raises(UsageError, match="have 1 keys already"):
        publisher.keys.add("bundles/home/command")
    assert main(["keys", "revoke", folder, key.keyid]) == 0
    assert publisher.keys.authors("home") == {} and publisher.keys.listing()[-1]["role"] == BUNDLES
    # A file that was not made by `keys add` is not published in a way that devices refuse.
    shutil.copy(theirs.trusted_keys("bundles/home/re.ply-2"), publisher.keys.folder)
    path = publisher.keys.trusted_keys("bundles/home/re.ply-2")
    path.write_text(path.read_text().replace(key.keyid, "XYZ"))
    with pytest.raises(VerificationError, match="XYZ"):
        publish(with_adapters(publisher.bundle, "reply"), publisher.repo, publisher.keys)
    monkeypatch.setattr("edgetune.delivery.publish.key_folder.MOST_AUTHORS", 2)
    publisher.keys.add("bundles/home/command")
    (other,) = publisher.keys.keys("bundles/home/command")
    path.write_text(path.read_text().replace("XYZ", other.keyid))
    with pytest.raises(UsageError, match=f"has two keys {other.keyid[:8]}"):
        publish(with_adapters(publisher.bundle, "reply"), publisher.repo, publisher.keys)


def test_copies_of_a_bundle_have_the_parts_of_authors(
    publisher: Publisher, author: KeyFolder, work: Path, tmp_path: Path
) -> None:
    publish_part(work, publisher.repo, author)
    bundle = composed(publisher, seen(publisher), tmp_path / "copied/home")
    trusted = publisher.keys.trusted_keys(BUNDLES)
    with open_store(f"oci-layout:{tmp_path / 'layout'}:v1", None, insecure=False) as store:
        push(bundle, store, Progress(quiet=True), repo=publisher.repo, channel="stable")
        channel = TrustedChannel(publisher.root.read_bytes(), "stable")
        pull(store, tmp_path / "out", Progress(quiet=True), trusted_channel=channel)
        # Into the same folder, whose files are all of the bundle.
        pull(store, tmp_path / "out", Progress(quiet=True), trusted_keys=trusted)
    assert read_signed_manifest(tmp_path / "out", trusted) == read_signed_manifest(bundle, trusted)
    with pytest.raises(UsageError, match="a part that an author publishes"):
        publish(bundle, publisher.repo, publisher.keys)
    check_destination(bundle)
    # With another adapter built into it, it has the author's adapter as one of its own.
    existing = ExistingBundle.read(tmp_path / "out", ["command"])
    existing.stage(tmp_path / "staged")
    with_adapters(tmp_path / "staged", "command")
    packed = pack(tmp_path / "staged", tmp_path / "packed", replace(existing.manifest, authors={}))
    assert "authors/reply/adapter.gguf" in read_manifest(packed).files
    # What else is in the place of a part is none.
    (bundle / "authors/other/part.json").mkdir(parents=True)
    assert identity_in(bundle) == seen(publisher).bundle
    shutil.rmtree(bundle / "authors/other")
    # Whoever changes it has another bundle, which says the same without parts.
    remove_from_bundle(bundle, "command")
    changed = read_manifest(bundle)
    assert (list(changed.adapters), changed.authors, (bundle / PART).exists()) == (["reply"], {}, False)
    verify_files(bundle, changed)
    remove_from_bundle(bundle, "reply")
    assert not (bundle / "authors").exists()
