from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from edgetune_runtime.bundle import read_manifest, verify_files
from edgetune_runtime.bundle.lock import locked
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME
from edgetune_runtime.errors import (
    BusyError,
    EdgetuneError,
    NotFoundError,
    OutOfSpaceError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from edgetune_runtime.update import http_client, slow_replies
from edgetune_runtime.update.http_client import HttpClient
from filelock import FileLock, Timeout
from kills import left_by_kills
from kits import contents, write_bundle
from registries import Reply, TokenService, docker_registry, needs_registry, replying
from repositories import PASSPHRASE, make_keys, publish, seen_by_device

from edgetune.cli.main import main
from edgetune.common.progress import Progress
from edgetune.delivery.oci import login
from edgetune.delivery.oci.reference import parse_reference
from edgetune.delivery.oci.release_metadata import METADATA_TYPE, TrustedChannel
from edgetune.delivery.oci.transfer import Pushed, open_store
from edgetune.delivery.oci.transfer import pull as pull_bundle
from edgetune.delivery.oci.transfer import push as push_bundle
from edgetune.delivery.publish import mirror
from edgetune.delivery.publish.key_files import PASSPHRASE as PASSPHRASE_VARIABLE
from edgetune.delivery.publish.publish import refresh, sign

_SILENT = Progress(quiet=True)


@pytest.fixture(autouse=True)
def without_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for Docker's settings."""
    folder = tmp_path / "docker"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    return folder


@pytest.fixture(params=["layout", pytest.param("registry", marks=needs_registry)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A reference without its tag."""
    if request.param == "layout":
        yield f"oci-layout:{tmp_path / 'layout'}"
        return
    with docker_registry(tmp_path / "registry") as host:
        yield f"oci://{host}/team/home"


def push(bundle: Path, reference: str, **options: Path) -> Pushed:
    with open_store(reference, None, insecure=False) as store:
        return push_bundle(bundle, store, _SILENT, **options)  # type: ignore[arg-type]


def pull(reference: str, out: Path, **options: object) -> str:
    with open_store(reference, None, insecure=False) as store:
        return str(pull_bundle(store, out, _SILENT, **options))  # type: ignore[arg-type]


def test_a_pulled_bundle_is_the_one_that_was_pushed(place: str, bundle: Path, tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    sign(bundle, keys)
    pushed = push(bundle, f"{place}:v1")
    found = pull(f"{place}:v1", tmp_path / "out", trusted_keys=keys.folder / "trusted-keys.json")
    assert found == str(pushed.reference)
    assert contents(tmp_path / "out") == contents(bundle)
    assert SIGNATURE_NAME in contents(bundle)
    # By its digest too, into a folder that has it already.
    assert pull(found, tmp_path / "out") == found
    assert not (tmp_path / ".out.pull").exists()


def test_a_file_that_is_there_is_not_sent_again(place: str, bundle: Path, tmp_path: Path) -> None:
    first = push(bundle, f"{place}:v1")
    assert first.sent_bytes == first.bytes
    assert push(bundle, f"{place}:again").sent_bytes == 0
    write_bundle(bundle, "two")
    second = push(bundle, f"{place}:v2")
    # The base is shared: what was sent are the answer, the manifest and the description.
    assert second.bytes - second.sent_bytes == len(b"weights")
    pull(f"{place}:v1", tmp_path / "out")
    assert (tmp_path / "out/answer.txt").read_text() == "one"
    pull(f"{place}:v2", tmp_path / "out")
    assert (tmp_path / "out/answer.txt").read_text() == "two"


def test_a_tag_moves_and_a_digest_stays(place: str, bundle: Path, tmp_path: Path) -> None:
    first = push(bundle, f"{place}:stable").reference
    write_bundle(bundle, "two")
    push(bundle, f"{place}:stable")
    pull(f"{place}:stable", tmp_path / "newest")
    pull(str(first), tmp_path / "first")
    assert (tmp_path / "newest/answer.txt").read_text() == "two"
    assert (tmp_path / "first/answer.txt").read_text() == "one"


def test_what_is_not_there_is_said_in_one_line(place: str, bundle: Path, tmp_path: Path) -> None:
    push(bundle, f"{place}:v1")
    with pytest.raises(NotFoundError, match=r"has no .*v2|v2.*unknown"):
        pull(f"{place}:v2", tmp_path / "out")
    with pytest.raises(NotFoundError):
        pull(f"{place}@sha256:{'0' * 64}", tmp_path / "out")
    with pytest.raises(NotFoundError, match=r"there is no image layout .*none; check the path"):
        pull(f"oci-layout:{tmp_path / 'none'}:v1", tmp_path / "out")
    with pytest.raises(UsageError, match="has no tag; push to a tag"):
        push(bundle, f"{place}@sha256:{'0' * 64}")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_the_keys_have_not_signed_is_refused_before_its_files_are_fetched(
    place: str, bundle: Path, tmp_path: Path
) -> None:
    keys = make_keys(tmp_path / "keys").folder / "trusted-keys.json"
    push(bundle, f"{place}:v1")
    with pytest.raises(VerificationError, match=rf"^{re.escape(place)}:v1 is not signed: it has no manifest.json.sig"):
        pull(f"{place}:v1", tmp_path / "out", trusted_keys=keys)
    fetched = {path.name for path in (tmp_path / ".out.pull/files").iterdir()}
    assert fetched == {hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()}


def test_a_pull_checks_the_release_of_a_bundle_as_a_device_does(
    place: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    keys, repo, out = make_keys(tmp_path / "keys"), tmp_path / "repo", tmp_path / "out"
    trusted, others = keys.folder / "1.root.json", make_keys(tmp_path / "others").folder / "1.root.json"
    words = ["push", str(bundle), f"{place}:v1", "--quiet"]
    sign(bundle, keys)
    assert main(words) == 0
    fetch = ["pull", f"{place}:v1", "--out", str(out), "--quiet", "--root"]
    assert main([*fetch, str(trusted)]) == NotFoundError.exit_code
    publish(bundle, repo, keys)
    # Also after a change of keys, which the root leads to; what was attached before is replaced.
    keys.rotate("targets")
    (repo / "metadata/old.root.json").touch()
    for _ in range(2):
        refresh(repo, keys, expires_days=30)
        assert main([*words, "--repo", str(repo)]) == 0
    with open_store(str(push(bundle, f"{place}:v1").reference), None, insecure=False) as store:
        (referrers,) = store.read_referrers()
    assert [item["artifactType"] for item in json.loads(referrers)["manifests"]] == [METADATA_TYPE]
    assert main([*fetch, str(trusted)]) == 0
    assert contents(out) == contents(bundle)
    assert main([*fetch, str(others)]) == VerificationError.exit_code
    assert main([*fetch, str(trusted), "--channel", "beta"]) == NotFoundError.exit_code
    # What is not the newest release cannot be passed off as it, and does not get the tag.
    write_bundle(bundle, "two")
    sign(bundle, keys)
    assert main([*words, "--repo", str(repo)]) == VerificationError.exit_code
    assert main([*fetch, str(trusted)]) == 0
    assert (out / "answer.txt").read_text() == "one"
    publish(bundle, repo, keys)
    assert main([*words, "--repo", str(repo)]) == 0
    assert main([*fetch, str(trusted)]) == 0
    assert (out / "answer.txt").read_text() == "two"


def test_a_registry_that_lists_referrers_itself_is_asked_for_all_of_them(bundle: Path, tmp_path: Path) -> None:
    keys, repo, layout = make_keys(tmp_path / "keys"), tmp_path / "repo", tmp_path / "layout"
    publish(bundle, repo, keys)
    push(bundle, f"oci-layout:{layout}:v1", repo=repo)
    tags = {
        item["annotations"]["org.opencontainers.image.ref.name"]: item["digest"]
        for item in json.loads((layout / "index.json").read_text())["manifests"]
    }

    def reply(_method: str, path: str, _headers: dict[str, str]) -> Reply:
        kind, _, name = path.removeprefix("/v2/home/").partition("/")
        if kind == "referrers" and not name.endswith("?n=1"):
            # The first part has what another program attached.
            status, headers, body = as_json({"manifests": [{"artifactType": "x", "digest": "sha512:0", "size": 1}]})
            return status, {**headers, "Link": f'<{path}?n=1>; rel="next"'}, body
        name = name.removesuffix("?n=1")
        # Not under a tag of their own, where a registry lists none.
        tag = name.replace(":", "-") if kind == "referrers" else name if name == "v1" else ""
        digest = tags.get(tag, name)
        file = layout / "blobs/sha256" / digest.removeprefix("sha256:")
        return (200, {}, file.read_bytes()) if file.is_file() else (404, {}, b"")

    trusted = TrustedChannel((keys.folder / "1.root.json").read_bytes(), "stable")
    with replying(reply) as host:
        pull(f"oci://{host}/home:v1", tmp_path / "out", trusted_channel=trusted)
    assert contents(tmp_path / "out") == contents(bundle)


def test_a_bundle_that_another_process_changes_is_not_replaced(bundle: Path, tmp_path: Path) -> None:
    layout, out = tmp_path / "layout", tmp_path / "out"
    push(bundle, f"oci-layout:{layout}:v1")
    pull(f"oci-layout:{layout}:v1", out)
    write_bundle(bundle, "two")
    push(bundle, f"oci-layout:{layout}:v2")
    with locked(out), pytest.raises(BusyError, match=f"another process changes bundle {out}"):
        pull(f"oci-layout:{layout}:v2", out)
    assert (out / "answer.txt").read_text() == "one"
    pull(f"oci-layout:{layout}:v2", out)
    assert contents(out) == contents(bundle)


def test_a_folder_with_other_files_is_not_replaced(place: str, bundle: Path, tmp_path: Path) -> None:
    push(bundle, f"{place}:v1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not a bundle"):
        pull(f"{place}:v1", tmp_path / "out")
    assert (tmp_path / "out/letter.txt").read_text() == "dear"


def test_a_pull_that_is_killed_at_any_write_goes_on(bundle: Path, tmp_path: Path) -> None:
    place, out = f"oci-layout:{tmp_path / 'layout'}", tmp_path / "work/out"
    push(bundle, f"{place}:v1")
    pull(f"{place}:v1", out)
    write_bundle(bundle, "two")
    push(bundle, f"{place}:v2")
    seen = []

    def action() -> int:
        pull(f"{place}:v2", out)
        return 0

    for _ in left_by_kills(action, out.parent):
        seen.append((out / "answer.txt").read_text())
        verify_files(out, read_manifest(out))
        action()
        assert (out / "answer.txt").read_text() == "two"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len(seen) > 10
    assert seen == sorted(seen) and set(seen) == {"one", "two"}


def test_a_push_that_is_killed_at_any_write_leaves_the_tag_valid(bundle: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    push(bundle, f"oci-layout:{layout}:stable")
    write_bundle(bundle, "two")
    seen = []

    def action() -> int:
        push(bundle, f"oci-layout:{layout}:stable")
        return 0

    for _ in left_by_kills(action, layout):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        pull(f"oci-layout:{layout}:stable", tmp_path / "out")
        seen.append((tmp_path / "out/answer.txt").read_text())
        action()
    assert len(seen) > 10
    assert seen == sorted(seen) and set(seen) == {"one", "two"}


def answers(*replies: tuple[str, Reply]) -> Callable[[str, str, dict[str, str]], Reply]:
    """What a registry answers to a request of METHOD PATH that contains the text; 404 to all others."""

    def reply(method: str, path: str, _: dict[str, str]) -> Reply:
        return next((found for text, found in replies if text in f"{method} {path}"), (404, {}, b""))

    return reply


def page(status: int) -> Reply:
    return status, {"Content-Type": "text/html; charset=utf-8"}, b"<html>log in</html>"


def as_json(value: object) -> Reply:
    return 200, {}, json.dumps(value).encode()


def layer(path: str, digest: str = "0" * 64, size: object = 3) -> dict[str, object]:
    return {"digest": f"sha256:{digest}", "size": size, "annotations": {"org.cncf.model.filepath": path}}


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (page(200), "is not a bundle: Expecting value"),
        (page(404), "is not a registry: GET http.* gave a page, status 404"),
        (page(502), "is not a registry"),
        ((500, {}, b""), "failed with status 500"),
        ((500, {}, b"[" * 10_000), "failed with status 500"),
        ((403, {}, b'{"errors": [{"message": "no such team"}]}'), "refuses GET .*: no such team; check the rights"),
        (as_json({"manifests": []}), "is not a bundle"),
        (as_json({"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}), "is of the type .*index"),
        (as_json({"mediaType": "a\nb"}), r"is of the type 'a\\nb'"),
        ((403, {}, b'{"errors": [{"message": "no\\nteam"}]}'), "refuses GET .*: no team; check the rights"),
        (as_json({"layers": [{"digest": "sha256:00", "size": 3}]}), "a layer without a file's name"),
        (as_json({"layers": [layer("manifest.json", "../../etc/passwd")]}), "is not a bundle: sha256 is"),
        (as_json({"layers": [layer("manifest.json"), layer("../x")]}), "outside the bundle"),
        (as_json({"layers": [layer("manifest.json"), layer("manifest.json/x")]}), "in place of a folder"),
        (as_json({"layers": [layer("manifest.json"), layer("x" * 300)]}), "which is too long"),
        (as_json({"layers": [layer("manifest.json", size="3\n")]}), "bytes is '3"),
        (as_json({"layers": [layer("model.gguf")]}), "it has no manifest.json"),
        (as_json({"layers": [layer("manifest.json", size=1 << 40)]}), "manifest.json of .* has 1099511627776 bytes"),
        ((200, {}, b"[" * (5 << 20)), "is not a bundle"),
        ((200, {"Docker-Content-Digest": "sha256:1"}, b"{}"), "names the digest sha256:1 for"),
        ((307, {"Location": "file:///etc/passwd"}, b""), "failed"),
        ((401, {"WWW-Authenticate": 'Basic realm="x"'}, b""), "asks for a login; run: docker login"),
        ((401, {}, b""), "asks for a login"),
        ((401, {"WWW-Authenticate": 'Bearer realm="ftp://x/token"'}, b""), "tokens are at .*, without encryption"),
    ],
)
def test_what_is_no_registry_or_no_bundle_is_refused_in_one_line(reply: Reply, problem: str, tmp_path: Path) -> None:
    with replying(lambda *_: reply) as host, pytest.raises(EdgetuneError, match=problem) as caught:
        pull(f"oci://{host}/home:v1", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tag", "problem"), [("a\nb", "its tags are: a b"), ({}, "is damaged"), (["v1"], "is damaged")]
)
def test_a_layout_with_an_odd_tag_is_refused_in_one_line(
    tag: object, problem: str, bundle: Path, tmp_path: Path
) -> None:
    push(bundle, f"oci-layout:{tmp_path / 'layout'}:v1")
    path = tmp_path / "layout/index.json"
    index = json.loads(path.read_text())
    index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] = tag
    path.write_text(json.dumps(index))
    with pytest.raises(EdgetuneError, match=problem) as caught:
        pull(f"oci-layout:{tmp_path / 'layout'}:v1", tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("blob", "problem"),
    [
        (b"owe", "are damaged"),
        (b"on", "2 of 3 bytes"),
        (b"one and more", "are damaged"),
        (b"<html>log in</html>", "are damaged"),
    ],
)
def test_bytes_without_their_digest_are_refused_and_the_version_before_stays(
    blob: bytes, problem: str, bundle: Path, tmp_path: Path
) -> None:
    layout, out = tmp_path / "layout", tmp_path / "out"
    push(write_bundle(bundle, "zero"), f"oci-layout:{layout}:v0")
    pull(f"oci-layout:{layout}:v0", out)
    push(write_bundle(bundle, "one"), f"oci-layout:{layout}:v1")
    changed = layout / "blobs/sha256" / hashlib.sha256(b"one").hexdigest()
    changed.write_bytes(blob)
    if blob.startswith(b"one"):
        # Only the described size is read.
        pull(f"oci-layout:{layout}:v1", out)
        return
    with pytest.raises(EdgetuneError, match=problem):
        pull(f"oci-layout:{layout}:v1", out)
    assert (out / "answer.txt").read_text() == "zero"
    changed.write_bytes(b"one")
    pull(f"oci-layout:{layout}:v1", out)
    assert (out / "answer.txt").read_text() == "one"


def test_a_registry_that_is_not_there_silent_or_slow_is_given_up(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnreachableError, match=r"refused; check the address.*--insecure"):
        pull("oci://127.0.0.1:1/home:v1", tmp_path / "out")
    monkeypatch.setattr(http_client, "SILENT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UnreachableError, match="timed out"):
        push(bundle, f"oci://127.0.0.1:{silent.getsockname()[1]}/home:v1")
    monkeypatch.undo()
    monkeypatch.setattr(slow_replies, "_GRACE_S", -1.0)
    monkeypatch.setattr(slow_replies, "_SLOWEST_BYTES_PER_S", 10**12)
    with replying(answers(("GET", as_json({})))) as host, pytest.raises(UnreachableError, match="came too slowly"):
        pull(f"oci://{host}/home:v1", tmp_path / "out")


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (lambda *_: page(200), r"takes no uploads"),
        (answers(("POST", (202, {"Location": "/upload"}, b"")), ("PUT", page(200))), "did not store what was sent"),
        (answers(("POST", (202, {"Location": "ftp://x/upload"}, b""))), "names the address ftp"),
        (answers(("POST", (413, {}, b""))), "failed with status 413"),
    ],
)
def test_a_registry_that_stores_nothing_is_said_to_do_so(
    reply: Callable[[str, str, dict[str, str]], Reply], problem: str, bundle: Path
) -> None:
    with replying(reply) as host, pytest.raises(UnreachableError, match=problem):
        push(bundle, f"oci://{host}/home:v1")


def test_a_disk_without_room_is_noticed_before_files_are_fetched(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bundle, f"oci-layout:{tmp_path / 'layout'}:v1")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(OutOfSpaceError, match=r"has 0\.0 MB free"):
        pull(f"oci-layout:{tmp_path / 'layout'}:v1", tmp_path / "out")


def test_a_fetch_whose_connection_is_lost_goes_on(bundle: Path, tmp_path: Path) -> None:
    layout, ranges = tmp_path / "layout", []
    (bundle / "base/big.bin").write_bytes(bytes(range(256)) * 1000)
    push(write_bundle(bundle, "one"), f"oci-layout:{layout}:v1")

    def reply(_method: str, path: str, headers: dict[str, str]) -> Reply:
        digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
        digest = digest if "/manifests/" in path else path.rpartition("/")[2]
        data = (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()
        begin = int(headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        ranges.append(begin)
        described = {"Content-Length": str(len(data) - begin), "Content-Range": f"bytes {begin}-{len(data) - 1}/*"}
        return 206 if begin else 200, described, data[begin : begin + 100_000]

    with replying(reply) as host:
        pull(f"oci://{host}/home:v1", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(bundle)
    assert {0, 100_000, 200_000} == set(ranges)


@needs_registry
def test_a_file_that_the_registry_changed_is_refused(bundle: Path, tmp_path: Path) -> None:
    with docker_registry(tmp_path / "registry") as host:
        push(bundle, f"oci://{host}/home:v1")
        digest = hashlib.sha256(b"one").hexdigest()
        (tmp_path / f"registry/storage/docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data").write_bytes(b"two")
        with pytest.raises(VerificationError, match="are damaged"):
            pull(f"oci://{host}/home:v1", tmp_path / "out")


# Of the user "me" with the password "secret", as `htpasswd -B` writes it.
_PASSWORDS = "me:$2b$05$5iFt6H5/gVIsny4B/7hDzOpkq5WubvfV7FNCVflmCNX27fbTp.h2K"


def test_a_long_challenge_takes_no_time() -> None:
    # Each letter as a beginning would be looked at for hours.
    with pytest.raises(UsageError, match="asks for a login"):
        login.answer(f"Bearer {'a' * 1_000_000}", None, "https://example.org", HttpClient("test"))


@needs_registry
def test_a_password_comes_from_docker_from_its_helper_or_from_the_environment(
    bundle: Path, tmp_path: Path, without_docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passwords").write_text(_PASSWORDS)
    settings = without_docker / "config.json"
    with docker_registry(
        tmp_path / "registry", f"auth: {{htpasswd: {{realm: x, path: {tmp_path}/passwords}}}}"
    ) as host:
        place = f"oci://{host}/home:v1"
        with pytest.raises(UsageError, match=f"{host} asks for a login; run: docker login {host}; or give --username"):
            push(bundle, place)
        settings.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(b"me:secret").decode()}}}))
        push(bundle, place)
        settings.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(b"me:wrong").decode()}}}))
        with pytest.raises(UsageError, match=r"refuses .*; check the rights of the user"):
            pull(place, tmp_path / "out")
        settings.write_text(json.dumps({"credsStore": "test"}))
        helper = without_docker / "docker-credential-test"
        helper.write_text("""#!/bin/sh\necho '{"Username": "me", "Secret": "secret"}'\n""")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{without_docker}:{os.environ['PATH']}")
        pull(place, tmp_path / "out")
        settings.unlink()
        monkeypatch.setenv("EDGETUNE_REGISTRY_PASSWORD", "secret")
        assert main(["pull", place, "--out", str(tmp_path / "out"), "--username", "me", "--quiet"]) == 0
        settings.write_text("{")
        with pytest.raises(UsageError, match=r"config.json cannot be used"):
            pull(place, tmp_path / "out")


@needs_registry
def test_a_registry_with_tokens_gets_one_from_its_service(bundle: Path, tmp_path: Path, without_docker: Path) -> None:
    service = TokenService(tmp_path, b"me:secret")
    with replying(service) as tokens, docker_registry(tmp_path / "registry", service.settings(tokens)) as host:
        place = f"oci://{host}/team/home:v1"
        with pytest.raises(UsageError, match="refuses"):
            push(bundle, place)
        stored = {"auths": {host: {"auth": base64.b64encode(b"me:secret").decode()}}}
        (without_docker / "config.json").write_text(json.dumps(stored))
        push(bundle, place)
        pull(place, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(bundle)
    # One token for what a command does; the registry names the actions in any order.
    pushed, pulled = (scope.removeprefix("repository:team/home:").split(",") for scope in service.scopes[-2:])
    assert sorted(pushed) == ["pull", "push"] and pulled == ["pull"]


def test_storage_to_which_a_registry_redirects_gets_no_password(
    bundle: Path, tmp_path: Path, without_docker: Path
) -> None:
    layout, seen = tmp_path / "layout", []
    push(bundle, f"oci-layout:{layout}:v1")

    def storage(_method: str, path: str, headers: dict[str, str]) -> Reply:
        seen.append("Authorization" in headers)
        return 200, {}, (layout / "blobs/sha256" / path.rpartition(":")[2]).read_bytes()

    with replying(storage) as elsewhere:

        def reply(_method: str, path: str, headers: dict[str, str]) -> Reply:
            if headers.get("Authorization") != "Basic " + base64.b64encode(b"me:secret").decode():
                return 401, {"WWW-Authenticate": 'Basic realm="x"'}, b""
            if "/manifests/" in path:
                digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
                return 200, {}, (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()
            return 307, {"Location": f"http://{elsewhere}{path}"}, b""

        with replying(reply) as host:
            stored = {"auths": {host: {"auth": base64.b64encode(b"me:secret").decode()}}}
            (without_docker / "config.json").write_text(json.dumps(stored))
            pull(f"oci://{host}/home:v1", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(bundle)
    assert seen and not any(seen)


@pytest.mark.parametrize("name", ["index.json", "blob"])
def test_a_pipe_in_a_layout_is_refused(name: str, bundle: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    push(bundle, f"oci-layout:{layout}:v1")
    answer = layout / "blobs/sha256" / hashlib.sha256(b"one").hexdigest()
    path = answer if name == "blob" else layout / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EdgetuneError, match="is not a regular file"):
        pull(f"oci-layout:{layout}:v1", tmp_path / "out")


def test_a_service_that_storage_names_gets_no_password(tmp_path: Path, without_docker: Path) -> None:
    asked = []

    def service(_method: str, path: str, _headers: dict[str, str]) -> Reply:
        asked.append(path)
        return as_json({"token": "t"})

    with (
        replying(service) as tokens,
        replying(lambda *_: (401, {"WWW-Authenticate": f'Bearer realm="http://{tokens}/"'}, b"")) as elsewhere,
        replying(lambda _, path, __: (307, {"Location": f"http://{elsewhere}{path}"}, b"")) as host,
    ):
        stored = {"auths": {host: {"auth": base64.b64encode(b"me:secret").decode()}}}
        (without_docker / "config.json").write_text(json.dumps(stored))
        with pytest.raises(UsageError, match="refuses GET"):
            pull(f"oci://{host}/home:v1", tmp_path / "out")
    assert asked == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "home:v1",
        "oci://home:v1",
        "oci://host/Home:v1",
        "oci://host/home",
        "oci://host/../home:v1",
        "oci-layout:dir",
    ],
)
def test_a_reference_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a reference to an artifact; write oci://"):
        parse_reference(text)


def test_references_are_read_and_written() -> None:
    digest = "0123456789abcdef" * 4
    for text in ("oci://host:5000/a/b.c:v1", f"oci://[::1]:5000/a@sha256:{digest}", "oci-layout:C:/x:y:v1"):
        assert str(parse_reference(text)) == text
    hosts = ("127.0.0.1:5000", "localhost", "[::1]:5000", "host.example", "10.0.0.1:5000")
    found = [parse_reference(f"oci://{host}/a:v1").is_on_loopback for host in hosts]
    assert found == [True, True, True, False, False]


@pytest.mark.parametrize("place", ["registry"], indirect=True)
@needs_registry
def test_a_bundle_of_a_registry_is_published_if_it_is_known(
    place: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    keys, others, repo = make_keys(tmp_path / "keys"), make_keys(tmp_path / "others"), tmp_path / "repo"
    words = ["publish", "--repo", str(repo), "--keys", str(keys.folder), "--json", "--quiet", "--from"]
    unsigned = push(bundle, f"{place}:unsigned").reference
    assert main([*words, f"{place}:unsigned"]) == VerificationError.exit_code
    assert not (repo / "metadata").exists()
    assert main([*words, str(unsigned)]) == 0
    sign(write_bundle(bundle, "two"), others)
    push(bundle, f"{place}:theirs")
    assert main([*words, f"{place}:theirs"]) == VerificationError.exit_code
    assert main([*words, f"{place}:theirs", "--trusted-keys", str(others.folder / "trusted-keys.json")]) == 0
    sign(write_bundle(bundle, "three"), keys)
    push(bundle, f"{place}:ours")
    assert main([*words, f"{place}:ours"]) == 0
    release = seen_by_device(repo, keys.folder / "1.root.json", tmp_path / "device")
    assert release.version == 3
    assert (repo / "blobs" / release.files["answer.txt"].sha256).read_text() == "three"
    assert not (repo / ".from").exists()
    assert main([*words, f"{place}:ours", str(bundle)]) == UsageError.exit_code


def test_a_mirror_fetches_what_the_repository_lacks(bundle: Path, tmp_path: Path) -> None:
    keys, repo, layout = make_keys(tmp_path / "keys"), tmp_path / "repo", tmp_path / "layout"
    publish(bundle, repo, keys)
    sign(write_bundle(bundle, "two"), keys)
    push(bundle, f"oci-layout:{layout}:v2")
    (layout / "blobs/sha256" / hashlib.sha256(b"weights").hexdigest()).unlink()
    with (
        open_store(f"oci-layout:{layout}:v2", None, insecure=False) as store,
        mirror.fetched(store, repo, keys, _SILENT, None) as found,
    ):
        assert contents(found) == contents(bundle)
        # Nobody can exchange it before it is published, and it is published within the lock.
        with pytest.raises(Timeout):
            FileLock(repo / ".lock", blocking=False).acquire()
        assert publish(found, repo, keys).release.version == 2


def test_a_bundle_with_keys_of_its_own_is_mirrored_if_these_have_signed_it(bundle: Path, tmp_path: Path) -> None:
    keys, repo, layout = make_keys(tmp_path / "keys"), tmp_path / "repo", tmp_path / "layout"
    sign(bundle, keys)
    push(bundle, f"oci-layout:{layout}:shared")
    keys.add("bundles/home")
    sign(bundle, keys)
    push(bundle, f"oci-layout:{layout}:own")

    def mirrored(tag: str) -> None:
        with (
            open_store(f"oci-layout:{layout}:{tag}", None, insecure=False) as store,
            mirror.fetched(store, repo, keys, _SILENT, None),
        ):
            pass

    mirrored("own")
    with pytest.raises(VerificationError, match=r"is not signed by a key in .*trusted-keys-home\.json"):
        mirrored("shared")
    assert not (repo / ".from").exists()
