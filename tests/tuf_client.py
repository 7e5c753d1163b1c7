#!/usr/bin/env python3
"""The client under test of TUF's conformance suite: the trust that updates have in a repository, as a command."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.release import METADATA_FOLDER
from edgetune_runtime.update.trust import TrustedRepository

ROOT_NAME = "trusted-root"


def main() -> int:
    """Run `init`, `refresh` or `download`; 1 if it fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    for name in ("refresh", "download"):
        commands.add_parser(name)
    options = parser.parse_args()
    root = options.metadata_dir / ROOT_NAME
    if options.command == "init":
        root.write_bytes(options.root.read_bytes())
        return 0
    start = datetime.fromtimestamp(0, UTC)
    try:
        with closing(Location(options.metadata_url.removesuffix(f"/{METADATA_FOLDER}/"))) as location:
            trusted = TrustedRepository(location, options.metadata_dir, root.read_bytes(), start)
            trusted.refresh()
            for name in options.target_name:
                if trusted.read_target(name, options.target_dir / quote(name, "")) is None:
                    return 1
    except EdgetuneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
