"""Update a fleet of simulated devices from one static repository whose server fails now and then.

    python benchmarks/fleet.py --devices 10000 --work /dev/shm/fleet
    python benchmarks/fleet.py build/smart-home --devices 100     # also one device with a real bundle

Each device is a prefix of its own with the real client: it checks, downloads, verifies, places and switches. Some of
the replies are cut off, damaged, or an error; a device that fails looks again in the next round, and its old version
must be whole meanwhile. All devices install release 1, then release 2 with another adapter, then look once more. The
trial is left out for them: it opens a model in a child process, which would cost 10,000 devices hours. BUNDLE is
installed with its trial on a device of its own, without failures: bytes, seconds, and what one changed adapter costs.
Needs the extra `update`; a fleet of 10,000 takes 2 GB in the folder of --work.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown, progress

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import (
    MANIFEST_NAME,
    BaseEntry,
    FileEntry,
    Manifest,
    read_manifest,
    sha256_of,
    verify_files,
)
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.store import trial
from edgetune_runtime.store.kit import Kit
from edgetune_runtime.update import update
from edgetune_runtime.update.update import UpdateSource

from benchmarks.fleet_server import Load, serving
from edgetune.common.progress import Progress
from edgetune.delivery.publish.key_folder import KeyFolder
from edgetune.delivery.publish.publish import publish

ADAPTER = "adapters/command/adapter.gguf"
TINY_ADAPTER_BYTES = 8192
MOST_ROUNDS = 100
_IMPORT = """
import sys, time
begin = time.process_time()
# Libraries of clouds that securesystemslib imports where a developer has them.
sys.modules.update(dict.fromkeys(("boto3", "google.cloud", "azure")))
import edgetune_runtime.update.update
print(time.process_time() - begin)
"""


class Fleet:
    """A repository with keys, and the devices that follow it."""

    def __init__(self, work: Path, devices: int, threads: int) -> None:
        self.repo, self._work, self._threads = work / "repo", work, threads
        (work / "keys").mkdir(parents=True)
        self._keys = KeyFolder(work / "keys", lambda: "only for a benchmark")
        self._keys.create(1, 1)
        self.devices = [work / f"devices/{number}" for number in range(devices)]

    def publish(self, bundle: Path) -> str:
        """Publish a bundle; the digest of its manifest."""
        published = publish(
            bundle,
            self.repo,
            self._keys,
            Progress(quiet=True),
            channel="stable",
            min_runtime="",
            share=1.0,
            expires_days=90,
        )
        return published.release.bundle

    def source(self, url: str) -> UpdateSource:
        """Where a device gets its updates."""
        return UpdateSource(url, root=self._work / "keys/1.root.json")

    def converge(self, source: UpdateSource, load: Load, digest: str) -> Result:
        """Let devices look until all have the bundle with this digest; what it took."""
        load.reset()
        begin, behind = time.monotonic(), self.devices
        rounds, problems = list[int](), Counter[str]()
        with ThreadPoolExecutor(self._threads) as pool:
            while behind and len(rounds) < MOST_ROUNDS:
                failures = list(pool.map(partial(_look, source), behind))
                problems.update(failure for failure in failures if failure)
                behind = [device for device, failure in zip(behind, failures, strict=True) if failure]
                rounds.append(len(behind))
        seconds = time.monotonic() - begin
        broken = sum(not _is_whole(device, digest) for device in self.devices)
        return {
            "seconds": seconds,
            "behind_after_round": rounds,
            "broken": broken,
            "problems": problems,
            **load.figures(),
        }


def _look(source: UpdateSource, device: Path) -> str:
    """Let a device update; the kind of its failure, empty if there is none."""
    before = _bundle_of(device)
    try:
        update.apply(device, source, lambda _: None)
    except EdgetuneError as error:
        assert before is None or _is_whole(device, before), f"{device} is broken: {error}"
        return type(error).__name__
    return ""


def _bundle_of(device: Path) -> str | None:
    manifest = device / "current/bundle" / MANIFEST_NAME
    return sha256_of(manifest) if manifest.exists() else None


def _is_whole(device: Path, digest: str) -> bool:
    """Whether a device runs the bundle with this digest, and all its files are right."""
    bundle = device / "current/bundle"
    try:
        verify_files(bundle, read_manifest(bundle))
    except EdgetuneError:
        return False
    return _bundle_of(device) == digest


def tiny_bundle(folder: Path, adapter: bytes) -> Path:
    """A bundle with a base and an adapter that nobody opens."""
    for name, data in (("base/model.gguf", b"base" * 4096), (ADAPTER, adapter)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    paths = ("base/model.gguf", ADAPTER)
    files = {path: FileEntry(sha256_of(folder / path), (folder / path).stat().st_size) for path in paths}
    base = BaseEntry("base", "ab" * 32, "llama", None, 1, 1, 1, 1, "", "", {"gguf": "base/model.gguf"})
    (folder / MANIFEST_NAME).write_text(Manifest("home", base, {}, files, context_length=1).to_json(), encoding="utf-8")
    return folder


def with_changed_adapter(bundle: Path) -> int:
    """Change a byte of the first adapter of a bundle; the bytes of its file."""
    manifest = read_manifest(bundle)
    name = next(file for entry in manifest.adapters.values() for file in entry.files.values())
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).unlink()
    (bundle / name).write_bytes(data)
    files = {**manifest.files, name: FileEntry(sha256_of(bundle / name), len(data))}
    (bundle / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    return len(data)


def measure_fleet(options: argparse.Namespace, work: Path) -> Result:
    """Two releases and a look without a newer one, for all devices."""
    fleet, bundle = Fleet(work, options.devices, options.threads), work / "home"
    asks, trial.golden_answers = trial.golden_answers, lambda prefix, kit: None
    try:
        digest = fleet.publish(tiny_bundle(bundle, b"1" * TINY_ADAPTER_BYTES))
        with serving(fleet.repo, options.failures) as load:
            source = fleet.source(load.url)
            phases = {"install": fleet.converge(source, load, digest)}
            progress(f"{options.devices} devices have release 1")
            digest = fleet.publish(tiny_bundle(bundle, b"2" * TINY_ADAPTER_BYTES))
            phases["update"] = fleet.converge(source, load, digest)
            phases["no news"] = fleet.converge(source, load, digest)
    finally:
        trial.golden_answers = asks
    return phases


def measure_bundle(path: Path, work: Path) -> Result:
    """A device with a real bundle: its install with the trial, a look without news, and an adapter that has changed."""
    bundle = Path(shutil.copytree(path, work / path.name))
    fleet = Fleet(work, 1, 1)
    (device,) = fleet.devices
    fleet.publish(bundle)
    with serving(fleet.repo, 0.0) as load:
        source = fleet.source(load.url)
        trial_s = []
        asks = trial.golden_answers

        def timed(prefix: Path, kit: Kit) -> dict[str, Any] | None:
            begin = time.monotonic()
            answers = asks(prefix, kit)
            trial_s.append(time.monotonic() - begin)
            return answers

        trial.golden_answers = timed
        begin = time.monotonic()
        update.apply(device, source, progress)
        installed = {"seconds": time.monotonic() - begin, "trial_s": sum(trial_s), **load.figures()}
        load.reset()
        update.apply(device, source, progress)
        no_news = load.figures()
        load.reset()
        adapter_bytes = with_changed_adapter(bundle)
        fleet.publish(bundle)
        # It answers differently than built.
        trial.golden_answers = lambda prefix, kit: None
        update.apply(device, source, progress)
        trial.golden_answers = asks
    figures = load.figures()
    beside = figures["bytes"] - adapter_bytes
    return {
        "name": path.name,
        "install": installed,
        "no news": no_news,
        "adapter": {**figures, "bytes_beside_the_adapter": beside},
    }


def import_s() -> float:
    """CPU time of importing the client."""
    words = [sys.executable, "-c", _IMPORT]
    return statistics.median(
        float(subprocess.run(words, capture_output=True, text=True, check=True).stdout) for _ in range(5)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the fleet, and one device with a real bundle if there is one; print or write the figures."""
    parser = BENCHMARK.parser(works=True)
    parser.add_argument("bundle", type=Path, nargs="?", help="a real bundle for one more device")
    parser.add_argument("--devices", type=int, default=10_000, help="number of devices (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=32, help="devices that look at once (default: %(default)s)")
    parser.add_argument("--failures", type=float, default=0.05, help="part of replies that fail (default: %(default)s)")
    options = BENCHMARK.options(parser, devices=20, threads=4)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        result: Result = {"import_s": import_s(), "fleet": measure_fleet(options, Path(name, "fleet"))}
        if options.bundle is not None:
            result["device"] = measure_bundle(options.bundle, Path(name, "one"))
    BENCHMARK.report(options, result)


def table(result: Result) -> str:
    """The figures of each phase."""
    devices = result["devices"]
    rows = [
        {
            "phase": phase,
            **figures,
            "rounds": len(figures["behind_after_round"]),
            "behind": figures["behind_after_round"][-1],
            "requests": figures["requests"] / devices,
            "bytes": figures["bytes"] / devices,
        }
        for phase, figures in result["fleet"].items()
    ]
    columns = {
        "phase": "{phase}",
        "seconds": "{seconds:.1f}",
        "rounds": "{rounds}",
        "requests per device": "{requests:.2f}",
        "bytes per device": "{bytes:.0f}",
        "failed replies": "{failed}",
        "devices behind": "{behind}",
        "devices broken": "{broken}",
    }
    text = f"{said_of_machine(result)}; {devices} devices\n\n{markdown(rows, columns)}"
    text += f"\nThe client imports in {result['import_s']:.2f} s of CPU time.\n"
    if "device" in result:
        one = result["device"]
        installed, no_news, adapter = one["install"], one["no news"], one["adapter"]
        text += (
            f"\n{one['name']}: installed in {installed['seconds']:.1f} s, {installed['trial_s']:.1f} s of it in the "
            f"trial. Without news: {no_news['requests']} request, {no_news['bytes']} bytes. A changed adapter: "
            f"{adapter['bytes_beside_the_adapter']} bytes beside its file.\n"
        )
    return text


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()
