"""Small kits with a stand-in for the runtime, which answers from text files, so that an install takes a second."""

from __future__ import annotations

import json
import os
import platform as this_machine
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgetune_runtime.bundle import MANIFEST_NAME, AdapterEntry, BaseEntry, FileEntry, Manifest, sha256_of
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME
from edgetune_runtime.store.kit import BUNDLE_FOLDER, KIT_NAME, SUMS_NAME, WHEELS_FOLDER, parse_kit
from edgetune_runtime.store.opening import DEFAULTS
from wheels import repack

from edgetune.delivery.board import main
from edgetune.delivery.kit import output
from edgetune.delivery.kit.make import AssembledKit, with_description
from edgetune.delivery.kit.program import board_program, install_script
from edgetune.delivery.kit.target_python import TargetPython
from edgetune.delivery.kit.wheels import read_wheel
from edgetune.delivery.wheel.wheel_file import zip_bytes

PYTHON = ".".join(map(str, sys.version_info[:2]))
# `check` and `serve` fail if the bundle says so. It imports little: tests start it hundreds of times.
_RUNTIME = """\
import os, sys, time
begin = time.monotonic()
command, bundle = sys.argv[1:3]
with open(os.path.join(bundle, "answer.txt")) as file:
    answer = file.read()
if command == "check":
    if answer == "wrong":
        sys.exit("edgetune-run: 1 of 1 adapters answer differently; report it")
    if answer == "crash":
        print("x.cpp:7: GGML_ASSERT(n > 0) failed", file=sys.stderr, flush=True)
        os.abort()
    if "--confined" not in sys.argv:
        sys.exit("edgetune-run: this must not run as root")
    print('{"command": {"same": true}}' if answer != "unknown" else "")
    sys.exit(3 if answer == "unknown" else 0)
if command == "serve":
    import http.server
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            warm = answer != "slow" or time.monotonic() > begin + 4
            self.send_response(200 if warm or self.path == "/healthz" else 503)
            self.end_headers()
            self.wfile.write(answer.encode())
    if answer != "mute":
        port = int(sys.argv[sys.argv.index("--port") + 1])
        http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
print(answer)
"""


def stand_in(folder: Path, version: str) -> Path:
    """A wheel of edgetune-runtime with only `python -m edgetune_runtime ask|check|serve BUNDLE`."""
    info = f"edgetune_runtime-{version}.dist-info"
    contents = {
        "edgetune_runtime/__init__.py": b"",
        "edgetune_runtime/__main__.py": _RUNTIME.encode(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: edgetune-runtime\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD"
    contents[record] = "".join(f"{name},,\n" for name in [*contents, record]).encode()
    out = folder / f"edgetune_runtime-{version}-py3-none-any.whl"
    out.write_bytes(zip_bytes(contents))
    return out


SYSTEMCTL = """\
#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> calls
case "$*" in
    *stop* | *disable* | *restart*) [ ! -f process ] || { kill "$(cat process)"; rm process; } ;;
esac
case "$*" in
    *restart*)
        eval "exec $(sed -n 's/^ExecStart=//p' units/systemd/user/*.service)" > /dev/null 2>&1 &
        echo $! > process ;;
    *ActiveState*)
        for unit; do :; done
        if [ -f "units/systemd/user/$unit" ] && [ -f process ] && kill -0 "$(cat process)" 2>/dev/null; then
            printf 'ActiveState=active\\nMainPID=%s\\n' "$(cat process)"
        else
            printf 'ActiveState=activating\\nMainPID=0\\n'
        fi ;;
    # As of a unit that has not failed, which nothing keeps loaded.
    *reset-failed*) exit 1 ;;
esac
"""
"""A stand-in for systemctl that starts the command of the unit's file, which is in `units` beside it."""


BASES = {"gguf": "base/model.gguf", "onnx": "base/onnx/model.onnx"}


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_bundle(
    folder: Path, answer: str, formats: Sequence[str] = ("gguf",), adapters: Mapping[str, AdapterEntry] | None = None
) -> Path:
    """A bundle that answers with a text; nothing else in it, such as the files of `adapters`, can be used."""
    for name in formats:
        (folder / BASES[name]).parent.mkdir(parents=True, exist_ok=True)
        (folder / BASES[name]).write_bytes(b"weights" if name == "gguf" else name.encode())
    (folder / "answer.txt").write_text(answer, encoding="utf-8")
    (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME]
    files = {str(path.relative_to(folder)): FileEntry(sha256_of(path), path.stat().st_size) for path in paths}
    base = BaseEntry("base", "ab" * 32, "llama", None, 1, 1, 1, 1, "", "", {name: BASES[name] for name in formats})
    manifest = Manifest(folder.name, base, adapters or {}, files, context_length=1)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def with_fields(**fields: object) -> Callable[[bytes], bytes]:
    """A `change` of `KitMaker` that sets fields of kit.json."""
    return lambda text: json.dumps({**json.loads(text), **fields}).encode()


class KitMaker:
    """Makes kits whose bundle answers with a text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pip = repack("pip", folder)

    def __call__(
        self, answer: str, *, runtime: str = "1", change: Callable[[bytes], bytes] = lambda text: text
    ) -> Path:
        """The folder of a kit; `change` changes its kit.json before its digest is taken."""
        bundle = {MANIFEST_NAME: answer.encode() * 2, "answer.txt": answer.encode(), "base/model.gguf": b"weights"}
        out = self.folder / f"kit-{len(list(self.folder.iterdir()))}"
        self.write(bundle, out, runtime=runtime, change=change)
        return out

    def write(
        self,
        bundle: output.Contents,
        out: Path,
        *,
        runtime: str = "1",
        change: Callable[[bytes], bytes] = lambda text: text,
    ) -> None:
        """Write a kit with these files of a bundle to `out`."""
        output.write(self._contents(bundle, runtime, change), out, "home-laptop")

    def assembled(self, bundle: output.Contents, change: Callable[[bytes], bytes]) -> AssembledKit:
        """A kit with these files of a bundle that is not written."""
        contents = self._contents(bundle, "1", change)
        described = contents[KIT_NAME]
        assert isinstance(described, bytes)
        return AssembledKit(parse_kit(described.decode()), contents)

    def _contents(self, bundle: output.Contents, runtime: str, change: Callable[[bytes], bytes]) -> output.Contents:
        found = [read_wheel(path) for path in (self.pip, stand_in(self.folder, runtime))]
        target = TargetPython(this_machine.machine(), PYTHON)
        contents: dict[str, Path | bytes] = {f"{WHEELS_FOLDER}/{wheel.path.name}": wheel.path for wheel in found}
        contents |= {f"{BUNDLE_FOLDER}/{name}": data for name, data in bundle.items()}
        contents |= {"board.pyz": board_program(), "install.sh": install_script(target)}
        given = {"opening": DEFAULTS, "ram_mb": 1, "memory_max_mb": 17}
        kit = with_description(contents, "home", target, found, board="laptop", engine="gguf", **given).kit
        described = change(kit.text.encode())
        return contents | {KIT_NAME: described, SUMS_NAME: output.sums(list(kit.files), described)}


def install_sh(kit: Path, *words: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run install.sh of a kit as a user does."""
    command = ["sh", str(kit / "install.sh"), *words]
    environment = {**os.environ, **(variables or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def run(*words: object) -> int:
    """Run board.pyz's commands in this process."""
    return main.main([str(word) for word in words])


def ask(prefix: Path) -> str:
    """What the current version answers, through PREFIX/bin/edgetune-run."""
    command = [str(prefix / "bin/edgetune-run"), "ask", str(prefix / "current/bundle")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def copied(prefix: Path, to: Path) -> Path:
    """Put a copy of a prefix in the place of `to`; returns it. The programs take a fifth of the time of Python."""
    subprocess.run(["rm", "-rf", str(to)], check=True)
    subprocess.run(["cp", "-a", str(prefix), str(to)], check=True)
    return to


def answer_of(prefix: Path) -> str:
    """What the current version would answer if it was asked, which takes a process."""
    return (prefix / "current/bundle/answer.txt").read_text(encoding="utf-8")
