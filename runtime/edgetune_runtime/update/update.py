"""Updates a device: finds the newest release, downloads what is missing of it, tries it, and switches to it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.store import switch, versions
from edgetune_runtime.store.durable import changing, installing
from edgetune_runtime.store.kit import BUNDLE_FOLDER, Kit
from edgetune_runtime.store.versions import Say

from .current import current_kit
from .description import describe, make_environment, require_engine, text_of_release
from .download import Blobs, download, of_wanted_formats, require_formats
from .fetch import Location
from .release import NAME, Release, newest_parts, path_of_part, with_parts
from .rollout import Choice, choose, device_id, why_not_run
from .state import (
    FOLDER,
    TRUSTED_FOLDER,
    UpdateState,
    read_root_file,
    read_state,
    read_trusted_root,
    write_state,
    write_trusted_root,
)
from .trust import TrustedRepository


@dataclass(frozen=True)
class UpdateSource:
    """Where updates come from; None is what the prefix remembers, or for `bundle` the only one that there is.

    `root` is a file with root metadata to trust from now on, `formats` are those to download, none for the default,
    `report_to` is where to report what runs, and `quota_mb` the most that the files of all versions may take, 0 for
    any.
    """

    repo: str | None = None
    bundle: str | None = None
    channel: str | None = None
    root: Path | None = None
    formats: tuple[str, ...] | None = None
    report_to: str | None = None
    quota_mb: float | None = None


@dataclass(frozen=True)
class DeviceRelease:
    """The release for a device, and what it has: `reason` says why it does not want another one.

    `parts` has the versions of its authors' parts by their paths in the repository.
    """

    choice: Choice
    current: Kit | None
    state: UpdateState
    parts: Mapping[str, int]

    @property
    def floors(self) -> dict[str, int]:
        """What the device has once the release is current, by the names of bundles and the paths of parts."""
        return {**self.state.floors, self.release.name: self.release.version, **self.parts}

    @property
    def release(self) -> Release:
        """The newest release that is for this device; the newest one if there is none."""
        return self.choice.release

    @property
    def is_new(self) -> bool:
        """Whether the device does not have this bundle in its formats."""
        current = self.current
        return current is None or current.bundle != self.release.bundle or {*current.engines} != {*self.formats}

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that the device has, or gets: what the user wants, or those of the current version, or all."""
        return self.state.formats or (self.release.formats if self.current is None else self.current.engines)

    @property
    def reason(self) -> str | None:
        """Why the device does not want the release; None if it does, or if it has it."""
        if not self.is_new:
            return None
        return self.state.why_refused(self.release.bundle) if self.choice.fits else self.choice.held_back

    def to_json(self) -> dict[str, Any]:
        """The release, whether it would be installed, and why not, as JSON values."""
        release = self.release
        return {
            "name": release.name,
            "channel": release.channel,
            "release": release.version,
            "available": self.is_new and self.reason is None,
            "refused": self.reason,
            "held_back": self.choice.held_back,
        }


def check(prefix: Path, source: UpdateSource) -> DeviceRelease:
    """Look for a newer release, and remember where it comes from.

    Raises UnreachableError if the repository cannot be reached, VerificationError if it is not acceptable, UsageError
    if the source is not known.
    """
    with installing(prefix), closing(_location_of(prefix, source)) as location:
        return _find(prefix, source, location)


def apply(prefix: Path, source: UpdateSource, say: Say) -> tuple[DeviceRelease, bool]:
    """Install the newest release and switch to it if it answers as built; whether anything changed.

    Raises what `check` does, OutOfSpaceError if the disk or the quota has too little room, IncompatibleError if the
    release needs a newer runtime, VerificationError if it does not answer as built. The previous version runs on then.
    """
    with installing(prefix), closing(_location_of(prefix, source)) as location:
        versions.require_free(prefix)
        newest = _find(prefix, source, location)
        if not newest.is_new:
            with changing(prefix):
                return newest, _finish(prefix, newest, say)
        unfit = why_not_run(newest.release)
        if unfit is not None:
            raise IncompatibleError(unfit, "update edgetune-runtime")
        if newest.reason is not None:
            if newest.current is None:
                raise NotFoundError(f"nothing is installed: {newest.reason}", "wait for another release")
            return newest, False
        bundle = None if newest.current is None else prefix / versions.CURRENT / BUNDLE_FOLDER
        quota_mb = newest.state.quota_mb
        blobs = Blobs(newest.release, location, bundle)
        kit = describe(of_wanted_formats(prefix, blobs, newest.formats, quota_mb, say), newest.current)
        download(prefix, kit, blobs, quota_mb, say)
        make_environment(prefix, kit)
        with changing(prefix):
            # While files were received, the user may have gone back.
            newest = replace(newest, state=read_state(prefix))
            if newest.state.why_refused(newest.release.bundle) is not None:
                return newest, False
            versions.place(prefix, kit)
            _check_manifest(prefix, kit, newest.release)
            _activate(prefix, kit, newest, say)
        return newest, True


def _location_of(prefix: Path, source: UpdateSource) -> Location:
    """The repository that the caller names, or the one that is remembered."""
    repo = source.repo or read_state(prefix).repo
    if not repo:
        raise UsageError("no repository is given", "add --repo URL")
    return Location(repo)


def _find(prefix: Path, source: UpdateSource, location: Location) -> DeviceRelease:
    state, current = read_state(prefix), current_kit(prefix)
    root = read_trusted_root(prefix)
    if source.root is not None:
        root = read_root_file(source.root)
    if root is None:
        message = f"{prefix} trusts no repository yet"
        raise UsageError(message, "add --root FILE once, with the 1.root.json of `edgetune keys init`")
    known = [] if current is None else [text_of_release(current, state.channel).encode()]
    trusted = TrustedRepository(location, prefix / FOLDER / TRUSTED_FOLDER, root, state.time, known)
    trusted.refresh()
    name = source.bundle or state.bundle or _name_among(trusted.names(), current)
    release = trusted.release(name, source.channel or state.channel)
    parts, floor = trusted.parts(name, release.channel), state.floors.get(name, 0)
    versions_found = [(f"release {release.version} of {name}", release.version, floor)]
    for each in parts:
        title = f"part {each.part.version} of {each.part.adapter.name} in {name}"
        versions_found.append((title, each.part.version, state.floors.get(path_of_part(each.role, release.channel), 0)))
    for title, version, least in versions_found:
        if version < least:
            message = f"{title} is older than {least}, which this device had, and the newest in {release.channel}"
            remedy = f"if it had another channel before, wait for a newer one in {release.channel}; if not, ask who"
            raise VerificationError(message, f"{remedy} publishes it: somebody may be replaying an old one")
    not_before = max(trusted.issued, state.time).isoformat()
    device = device_id(name, state.device)
    choice = choose(release, partial(trusted.release, name, release.channel), device, floor)
    if source.formats:
        # Before they are remembered.
        require_formats(choice.release, source.formats)
        require_engine(source.formats, current)
    with changing(prefix):
        # While metadata was read, the user may have gone back.
        state, current = read_state(prefix), current_kit(prefix)
        state = replace(
            state,
            repo=location.text,
            bundle=name,
            channel=release.channel,
            formats=state.formats if source.formats is None else source.formats,
            not_before=not_before,
            device=device,
            report_to=state.report_to if source.report_to is None else source.report_to,
            quota_mb=state.quota_mb if source.quota_mb is None else source.quota_mb,
        )
        if source.root is not None:
            write_trusted_root(prefix, root)
        write_state(prefix, state)
    parts = newest_parts(choice.release, parts)
    choice = replace(choice, release=with_parts(choice.release, parts))
    floors = {path_of_part(each.role, release.channel): each.part.version for each in parts}
    return DeviceRelease(choice, current, state, floors)


def _name_among(names: list[str], current: Kit | None) -> str:
    """The bundle to follow: the one that is installed, or the only one."""
    if current is not None and current.name in names:
        return current.name
    if len(names) != 1 or not NAME.fullmatch(names[0]):
        raise UsageError(f"the repository has {len(names)} bundles", f"add --bundle NAME: {', '.join(names)}")
    return names[0]


def _check_manifest(prefix: Path, kit: Kit, release: Release) -> None:
    """VerificationError unless all files of the bundle are those of the release; errors as those of `read_manifest`."""
    manifest = read_manifest(versions.path_of(prefix, kit.version) / BUNDLE_FOLDER)
    wrong = [name for name, entry in manifest.files.items() if release.files.get(name) != entry]
    if wrong or manifest.name != release.name:
        message = f"release {release.version} of {release.name} does not match its manifest"
        raise VerificationError(message, "publish the bundle again")


def _activate(prefix: Path, kit: Kit, newest: DeviceRelease, say: Say) -> bool:
    """Switch to a version, and remember how that ended."""
    # Another switch may have been cut off before.
    state, release = replace(newest.state, switching=""), newest.release
    write_state(prefix, replace(state, switching=kit.version))
    try:
        changed = switch.activate(prefix, kit, None, say)
    except VerificationError:
        count = state.failures.get(release.bundle, 0) + 1
        write_state(prefix, replace(state, failures={**state.failures, release.bundle: count}))
        raise
    write_state(prefix, replace(state, floors=newest.floors))
    return changed


def _finish(prefix: Path, newest: DeviceRelease, say: Say) -> bool:
    """Complete a switch to the current version that was cut off; whether anything changed."""
    # While metadata was read, the user may have gone back.
    newest, current = replace(newest, state=read_state(prefix)), current_kit(prefix)
    if newest.current is None or newest.current != current:
        return False
    if newest.state.switching == newest.current.version:
        return _activate(prefix, newest.current, newest, say)
    write_state(prefix, replace(newest.state, floors=newest.floors, switching=""))
    return False
