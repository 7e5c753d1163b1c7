"""Parses the boards to deploy to: USER@HOST[:PORT], or an inventory file of such lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import NotFoundError, UsageError

FORM = "USER@HOST[:PORT]"
# An address of IPv6 is in brackets. A leading - would be an option of ssh.
_TARGET = re.compile(
    r"(?P<host>(?:[\w.][\w.-]*@)?(?:[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+(?:%\w+)?\]))(?::(?P<port>\d{1,5}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Target:
    """A board: what ssh gets as its host, and the port if it is not the one in the user's ssh configuration."""

    host: str
    port: int | None = None

    def __str__(self) -> str:
        host = self.host
        if self.port is None:
            return host
        user, at, name = host.rpartition("@")
        return f"{user}{at}[{name}]:{self.port}" if ":" in name else f"{host}:{self.port}"


def parse_target(text: str) -> Target:
    """The board that `text` names; UsageError if it is not of the form USER@HOST[:PORT]."""
    match = _TARGET.fullmatch(text)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or (port is not None and not 0 < port < 65536):
        raise UsageError(
            f"{text!r} is not of the form {FORM}", "write for example pi@192.168.1.20 or pi@[fe80::1]:2222"
        )
    return Target(match["host"].replace("[", "").replace("]", ""), port)


def read_inventory(path: Path) -> list[Target]:
    """The boards of an inventory: one per line, # starts a comment. UsageError names the lines that are wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise NotFoundError(f"cannot read {path}: {reason}", f"give a text file with one {FORM} per line") from error
    targets: dict[Target, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            target = parse_target(text)
        except UsageError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        if target in targets:
            problems.append(f"{path}:{number}: {text} is also in line {targets[target]}; keep one")
        targets.setdefault(target, number)
    if problems:
        raise UsageError("\n".join(problems))
    if not targets:
        raise UsageError(f"{path} names no board", f"write one {FORM} per line")
    return list(targets)
