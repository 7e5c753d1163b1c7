"""Sets up daily updates of an installed kit from a signed repository."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.store import timer
from edgetune_runtime.store.durable import locked
from edgetune_runtime.store.timer import Timer
from edgetune_runtime.store.versions import Say
from edgetune_runtime.update.state import read_root_file, read_state, refuse_login, write_state, write_trusted_root


@dataclass(frozen=True)
class Repository:
    """The address of a signed repository, and its root metadata, which says which keys to trust."""

    url: str
    root: bytes


@dataclass(frozen=True)
class Updates:
    """A repository, and the timer of updates from it."""

    repository: Repository
    timer: Timer

    def set_up(self, prefix: Path, bundle: str, say: Say) -> None:
        """Follow the bundle in the repository, whose root is trusted from now on, and update once a day."""
        with locked(prefix):
            write_state(prefix, replace(read_state(prefix), repo=self.repository.url, bundle=bundle))
            write_trusted_root(prefix, self.repository.root)
            before = timer.installed(prefix, say)
            if before not in (None, self.timer):
                before.remove(prefix)
            self.timer.install(prefix, bundle)


def updates_from_options(repo: str | None, root: Path | None, unit: str) -> Updates | None:
    """What the user asks for, if anything; the timer is named after the unit.

    IncompatibleError without systemd, and errors as those of `repository_from_options`.
    """
    repository = repository_from_options(repo, root)
    if repository is None:
        return None
    if shutil.which("systemctl") is None:
        raise IncompatibleError("this system has no systemctl", "install without --updates")
    return Updates(repository, Timer(f"{unit}-update", os.geteuid() != 0))


def repository_from_options(repo: str | None, root: Path | None) -> Repository | None:
    """The repository that the user gives, if any.

    UsageError for a wrong address or a file that is not a root, NotFoundError without it.
    """
    if repo is None and root is None:
        return None
    if repo is None:
        raise UsageError("--root is that of a repository", "add --updates URL")
    if not repo.startswith(("http://", "https://")):
        raise UsageError(f"--updates {repo!r} is not an address of a repository", "use http:// or https://")
    refuse_login("--updates", repo)
    if root is None:
        raise UsageError("no root says which keys to trust", "add --root FILE, the 1.root.json of `edgetune keys init`")
    return Repository(repo.rstrip("/"), read_root_file(root))
