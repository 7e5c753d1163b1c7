"""Parts of authors on a device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from edgetune_runtime.bundle import MANIFEST_NAME, FileEntry, read_manifest, sha256_of
from edgetune_runtime.bundle.parts import identity_in, part_path
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.store.durable import installing
from edgetune_runtime.update import current, update
from edgetune_runtime.update.release import path_of_part
from edgetune_runtime.update.state import read_state, write_state
from edgetune_runtime.update.update import UpdateSource
from kits import ask, write_bundle
from repositories import Publisher, Server, author_of, publish, publish_part, sign_as_author, with_adapters

from edgetune.delivery.publish.key_folder import KeyFolder
from edgetune.delivery.publish.repository import Repository

pytestmark = pytest.mark.slow
PART = part_path("reply")
BUNDLE = "current/bundle"


@pytest.fixture
def author(publisher: Publisher, tmp_path: Path) -> KeyFolder:
    return author_of(publisher, tmp_path / "author-keys")


def apply(prefix: Path) -> bool:
    return update.apply(prefix, UpdateSource(), lambda _: None)[1]


def reply_of(prefix: Path) -> str:
    """What is in the file of the adapter."""
    manifest = read_manifest(prefix / BUNDLE)
    return (prefix / BUNDLE / manifest.adapter("reply").files["gguf"]).read_text()


def test_a_device_takes_the_parts_of_authors(
    prefix: Path, publisher: Publisher, server: Server, author: KeyFolder, tmp_path: Path
) -> None:
    assert update.apply(prefix, UpdateSource(repo=server.url, root=publisher.root), lambda _: None)[1]
    owners = reply_of(prefix)
    work = with_adapters(tmp_path / "author/home", "reply")
    (work / "adapters/reply/adapter.gguf").write_bytes(b"new" * 100_000)
    work = _listed(work)
    publish_part(work, publisher.repo, author)
    assert update.check(prefix, UpdateSource()).to_json()["available"]
    server.sent.clear()
    assert apply(prefix)
    assert reply_of(prefix) == "new" * 100_000 and ask(prefix) == "one"
    assert 300_000 < sum(server.sent) < 300_000 + 16_000
    kit = current.current_kit(prefix)
    assert kit is not None and kit.bundle == identity_in(prefix / BUNDLE)
    server.sent.clear()
    server.requests.clear()
    assert not apply(prefix)
    assert server.requests == ["metadata/timestamp.json"] and sum(server.sent) < 4000
    # A release of the owner keeps it.
    publish(with_adapters(publisher.bundle, "command", "reply", answer="two"), publisher.repo, publisher.keys)
    assert apply(prefix)
    assert reply_of(prefix) == "new" * 100_000 and ask(prefix) == "two"
    # A user goes back from it, until there is another part.
    current.roll_back(prefix, "no", lambda _: None)
    assert not apply(prefix) and ask(prefix) == "one"
    publish_part(with_adapters(work, "reply", answer="three"), publisher.repo, author)
    assert apply(prefix)
    assert reply_of(prefix).endswith("three") and ask(prefix) == "two"
    (key,) = publisher.keys.keys("bundles/home/reply")
    publisher.keys.revoke(key.keyid)
    publish(publisher.bundle, publisher.repo, publisher.keys)
    assert apply(prefix)
    assert reply_of(prefix) == owners.replace("one", "two")


def _listed(bundle: Path) -> Path:
    """The bundle, whose manifest has the digests of its files as they are now."""
    return write_bundle(bundle, "one", adapters=read_manifest(bundle).adapters)


def test_an_older_part_is_refused_and_one_for_another_base_is_left_out(
    prefix: Path, publisher: Publisher, author: KeyFolder, tmp_path: Path
) -> None:
    source = UpdateSource(repo=str(publisher.repo), root=publisher.root)
    work = with_adapters(tmp_path / "author/home", "reply")
    publish_part(work, publisher.repo, author)
    assert update.apply(prefix, source, lambda _: None)[1]
    (path,) = [name for name in read_state(prefix).floors if "~" in name]
    with installing(prefix):
        state = read_state(prefix)
        write_state(prefix, replace(state, floors={**state.floors, path: 2}))
    with pytest.raises(VerificationError, match="part 1 of reply in home is older than 2, which this device had"):
        update.check(prefix, source)
    publish_part(with_adapters(work, "reply", answer="two"), publisher.repo, author)
    assert apply(prefix)
    # Another channel may have an older one than the channel before.
    publish(publisher.bundle, publisher.repo, publisher.keys, channel="beta")
    publish_part(with_adapters(work, "reply", answer="three"), publisher.repo, author, channel="beta")
    assert update.apply(prefix, replace(source, channel="beta"), lambda _: None)[1]
    publish(with_adapters(publisher.bundle, "command", "reply", answer="four"), publisher.repo, publisher.keys)
    assert update.apply(prefix, replace(source, channel="stable"), lambda _: None)[1]
    assert reply_of(prefix).endswith("two")
    text = (publisher.bundle / MANIFEST_NAME).read_text().replace("ab" * 32, "cd" * 32)
    (publisher.bundle / MANIFEST_NAME).write_text(text)
    publish(publisher.bundle, publisher.repo, publisher.keys)
    assert apply(prefix)
    assert not (prefix / BUNDLE / PART).exists() and str(publisher.bundle) in reply_of(prefix)


def test_a_part_with_a_wrong_signature_is_refused_before_its_files_are_read(
    prefix: Path, publisher: Publisher, server: Server, author: KeyFolder, tmp_path: Path
) -> None:
    assert update.apply(prefix, UpdateSource(repo=server.url, root=publisher.root), lambda _: None)[1]
    publish_part(with_adapters(tmp_path / "author/home", "reply"), publisher.repo, author)

    def damage(repository: Repository, role: str) -> None:
        name, path = role.removeprefix("bundle-"), path_of_part(role, "stable")
        raw = json.loads(repository.read_release(repository.releases(name)[path]))
        raw["signatures"][0]["sig"] = "00" * 64
        data = json.dumps(raw).encode()
        file = repository.put_release(name, path, data, 2)
        repository.put_blob(file, FileEntry(sha256_of(file), len(data)))

    sign_as_author(publisher, author, damage)
    server.requests.clear()
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"authors/reply/part\.json is not signed by its author's key"):
            apply(prefix)
    assert sum(path.startswith("blobs/") for path in server.requests) == 1
    assert ask(prefix) == "one" and not (prefix / BUNDLE / PART).exists()
