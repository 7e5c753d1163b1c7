"""An existing bundle that a build adds adapters to: its files that stay, and the manifest with the new adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import Manifest, read_manifest, verify_files
from edgetune_runtime.errors import IncompatibleError, VerificationError

from edgetune.common.files import link_or_copy

# What a plan predicts for the adapters together.
_OF_ALL_ADAPTERS = ("board", "needs")


def gguf_base_of(manifest: Manifest) -> str | None:
    """The base's GGUF file in a bundle, which a recipe can name as its base; None if it has none."""
    return next((file for file in manifest.base.files.values() if file.endswith(".gguf")), None)


@dataclass(frozen=True)
class ExistingBundle:
    """The bundle in `folder` with its manifest before the build, which adds or replaces the adapters `added`.

    `replaces_router`: the build trains a router for it too.
    """

    folder: Path
    manifest: Manifest
    added: frozenset[str]
    replaces_router: bool = False

    @classmethod
    def read(cls, folder: Path, added: Iterable[str], *, replaces_router: bool = False) -> ExistingBundle:
        """Read a bundle and check its files.

        Raises NotFoundError if there is none, VerificationError if a file is damaged, UsageError if the folder has
        files of someone else.
        """
        manifest = read_manifest(folder)
        check_destination(folder)
        verify_files(folder, manifest)
        return cls(folder, manifest, frozenset(added), replaces_router)

    @property
    def kept_files(self) -> list[str]:
        """The files that stay: the base, the other adapters, and a router. Shipped states are computed again."""
        replaced = tuple(f"{folder}/{name}/" for folder in ("adapters", "authors") for name in self.added)
        if self.replaces_router and self.manifest.router is not None:
            replaced += (self.manifest.router.file,)
        return [
            name for name in self.manifest.files
            if name.startswith(("base/", "adapters/", "authors/")) and not name.startswith(replaced)
        ]  # fmt: skip

    def check_base(self, name: str, fingerprint: str) -> None:
        """IncompatibleError if the base `name` of a build is not the bundle's."""
        expected = self.manifest.base.fingerprint
        if fingerprint == expected:
            return
        message = f"base {name!r} has sha256 {fingerprint[:12]}…, that of {self.folder} {expected[:12]}…"
        raise IncompatibleError(message, f"{self.base_remedy}build another bundle")

    @property
    def base_remedy(self) -> str:
        """How a recipe names the base of the bundle; empty if it has no file that a recipe can name."""
        file = gguf_base_of(self.manifest)
        return "" if file is None else f"set base: {self.folder / file}, or "

    def stage(self, work: Path) -> None:
        """Put the files that stay into `work`, as links where the file system has them."""
        for name in self.kept_files:
            link_or_copy(self.folder / name, work / name)

    def with_adapters(self, new: Manifest) -> Manifest:
        """The manifest `new` of the added adapters, with what this bundle keeps: base, settings and other adapters."""
        old = self.manifest
        return replace(
            new,
            name=old.name,
            base=old.base,
            adapters={**old.adapters, **new.adapters},
            router=new.router if self.replaces_router else old.router,
            recipe=self._joined(old.recipe, new.recipe, ["route"] if self.replaces_router else []),
            plan=self._joined(old.plan, new.plan, _OF_ALL_ADAPTERS),
        )

    def _joined(self, old: Mapping[str, Any], new: Mapping[str, Any], renewed: Iterable[str]) -> dict[str, Any]:
        """The recipe or the plan of the bundle, with what is new: added adapters, these keys, and those it lacks."""
        kept = {name: item for name, item in old.get("adapters", {}).items() if name in self.manifest.adapters}
        added = {name: item for name, item in new["adapters"].items() if name in self.added}
        return {**new, **old, **{key: new[key] for key in renewed}, "adapters": {**kept, **added}}

    def check_unchanged(self, packed: Manifest) -> None:
        """VerificationError if a file that stays is another one in `packed`, or the bundle was changed meanwhile."""
        before = {name: self.manifest.files[name] for name in self.kept_files}
        if read_manifest(self.folder) != self.manifest or any(packed.files[name] != before[name] for name in before):
            message = f"{self.folder} was changed while adapters were built for it"
            raise VerificationError(message, "run the same command again")
