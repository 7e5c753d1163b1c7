"""Opens changed files of signed updates: a repository's metadata, releases, signatures, and what a device writes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.store import acknowledgement, versions

from .names import AUTHORED, DEVICE, KEYS, PARTED, REPORT, REPOSITORY, RUN, SIGNED

Open = Callable[[bytes], None]
METADATA = {
    "root": "1.root.json",
    "timestamp": "timestamp.json",
    "snapshot": "1.snapshot.json",
    "targets": "1.targets.json",
    "bundle": f"1.bundle-{SIGNED}.json",
}
"""Files of a repository's metadata by what they are."""
TRUSTED_KEYS = f"{KEYS}/trusted-keys.json"
STATE = "update/state.json"
NOTE = f"{DEVICE}/{acknowledgement.NAME}"


def metadata(role: str, file: str, folder: Path) -> Open:
    """Opens changed metadata, signed by its key if it can be, as a repository's, and then as what a device has kept."""
    from edgetune_runtime.update.fetch import Location  # noqa: PLC0415 - each worker imports what it needs
    from edgetune_runtime.update.trust import TrustedRepository  # noqa: PLC0415
    from repositories import open_keys  # noqa: PLC0415
    from tuf.api.exceptions import RepositoryError  # noqa: PLC0415
    from tuf.api.metadata import Metadata  # noqa: PLC0415

    path, known = folder / REPOSITORY / "metadata" / file, folder / "known"
    valid, root = path.read_bytes(), (folder / KEYS / "1.root.json").read_bytes()
    keys = open_keys(folder / KEYS)
    signing = "bundles" if role == "bundle" else role
    signers = keys.signers(signing, keys.keys(signing))

    def look() -> None:
        trusted = TrustedRepository(
            Location(str(folder / REPOSITORY)), known, root_in_use[0], datetime.fromtimestamp(0, UTC)
        )
        trusted.refresh()
        for name in trusted.names():
            trusted.release(name, "stable")
            trusted.parts(name, "stable")

    def signed(data: bytes) -> bytes:
        with contextlib.suppress(RepositoryError):
            changed = Metadata.from_bytes(data)
            for signer in signers:
                changed.sign(signer)
            return changed.to_bytes()
        return data

    root_in_use = [root]

    def open_changed(data: bytes) -> None:
        shutil.rmtree(known, ignore_errors=True)
        look()
        for kept in (known / file.removeprefix("1."), known / "root_history" / file):
            if kept.is_file() and not kept.is_symlink():
                kept.write_bytes(data)
        try:
            look()
        except EdgetuneError as error:
            raise AssertionError("metadata that was damaged on a device is not read again") from error
        shutil.rmtree(known)
        if role == "root":
            root_in_use[0] = signed(data)
        else:
            path.write_bytes(signed(data))
        try:
            look()
        finally:
            root_in_use[0] = root
            path.write_bytes(valid)

    return open_changed


def release(folder: Path) -> Open:
    """Opens a changed release, and describes the version that it becomes."""
    from edgetune_runtime.update.description import describe  # noqa: PLC0415 - as above
    from edgetune_runtime.update.release import parse_release  # noqa: PLC0415

    def open_changed(data: bytes) -> None:
        describe(parse_release(data), None)

    return open_changed


def only_release(repository: Path) -> bytes:
    """The release of a repository."""
    (path,) = repository.glob("targets/*/*.json")
    return path.read_bytes()


def signature(file: str, folder: Path) -> Open:
    """Opens a changed signature of a bundle, or changed keys that it is compared with."""
    from edgetune_runtime.bundle.signatures import require_signed  # noqa: PLC0415 - as above

    def open_changed(data: bytes) -> None:
        (folder / file).write_bytes(data)
        require_signed(folder / SIGNED, folder / TRUSTED_KEYS)

    return open_changed


def part(folder: Path) -> Open:
    """Opens a changed part of a bundle, signed by its author if it can be, as a bundle's and as a repository's."""
    from edgetune_runtime.bundle.parts import part_path, signed_bytes  # noqa: PLC0415 - as above
    from edgetune_runtime.bundle.signatures import read_signed_manifest  # noqa: PLC0415
    from edgetune_runtime.update.release import parse_released_part, role_of_part  # noqa: PLC0415
    from repositories import open_keys  # noqa: PLC0415

    keys, holder = open_keys(folder / KEYS), f"bundles/{PARTED}/{AUTHORED}"
    (key,) = keys.keys(holder)
    (signer,) = keys.signers(holder, [key])

    def open_changed(data: bytes) -> None:
        with contextlib.suppress(ValueError, AttributeError, LookupError, TypeError, RecursionError):
            raw = json.loads(data)
            signature = signer.sign(signed_bytes(raw["part"]))
            # One that was changed is read too, before the one that fits.
            raw["signatures"].append({"keyid": signature.keyid, "sig": signature.signature})
            data = json.dumps(raw).encode()
        (folder / PARTED / part_path(AUTHORED)).write_bytes(data)
        read_signed_manifest(folder / PARTED, folder / TRUSTED_KEYS)
        parse_released_part(data, role_of_part(PARTED, AUTHORED, key.keyid))

    return open_changed


def state(folder: Path) -> Open:
    """Looks for an update with a changed state of the device."""
    from edgetune_runtime.update.state import text_of_state  # noqa: PLC0415 - as above
    from edgetune_runtime.update.update import UpdateSource, check  # noqa: PLC0415 - as above

    def open_changed(data: bytes) -> None:
        # With a checksum that is right again, or everything would be refused for that.
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            values = json.loads(data)
            values.pop("crc32", None)
            data = text_of_state(values).encode()
        (folder / DEVICE / STATE).write_bytes(data)
        check(folder / DEVICE, UpdateSource())

    return open_changed


def report(folder: Path) -> Open:
    """Counts a device by its changed report."""
    from edgetune_runtime.update.report import parse_report  # noqa: PLC0415 - as above

    from edgetune.delivery.publish.reports import fleet_status  # noqa: PLC0415

    def open_changed(data: bytes) -> None:
        (folder / REPORT).write_bytes(data)
        fleet_status(folder, 7).to_json()
        # The count hides why a report is refused.
        parse_report(data)

    return open_changed


def start(file: str, folder: Path) -> Open:
    """Counts two starts of the current version, with a changed note of it or a changed report of its last run."""
    prefix, valid = folder / DEVICE, {name: (folder / name).read_bytes() for name in (NOTE, RUN)}
    noted = json.loads(valid[NOTE])[0]["version"]
    versions.path_of(prefix, noted).mkdir(parents=True)
    (prefix / versions.CURRENT).symlink_to(f"{versions.FOLDER}/{noted}")
    os.environ[acknowledgement.REPORT_VARIABLE] = str(folder / RUN)

    def open_changed(data: bytes) -> None:
        for name, content in {**valid, file: data}.items():
            (folder / name).write_bytes(content)
        for _ in range(2):
            acknowledgement.count_start(prefix)
        if file == RUN and (folder / NOTE).exists() and acknowledgement.read(prefix) is None:
            raise AssertionError("a report of a run has damaged the note of its version")

    return open_changed
