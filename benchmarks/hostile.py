"""Attack a bundle's server: does another client get its answer, does the server live on?

    edgetune build examples/smart-home/quick.yaml --out build/smart-home
    python benchmarks/hostile.py build/smart-home --json build/hostile.json
    python benchmarks/hostile.py build/smart-home --only references --only split

Each attack gets a server of its own with short limits, and while it runs, another client with an address of its own
asks a short question and for the server's health. The exit code is 1 if any attack misses a target.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.machine import this_machine
from benchmarks.harness.tables import markdown, progress

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import read_manifest

from benchmarks import hostile_connections, hostile_requests, hostile_schemas
from benchmarks.hostile_attack import WRONG, Attack, Replies
from benchmarks.hostile_server import Names, OtherClient, Server, attacked_server

# The targets of every attack.
OTHER_WAIT_S = 5.0
"""The longest wait of another client for a short answer."""
REQUEST_S = 10.0
"""The longest time of a request whose limit is 4 s."""
GROWTH_MB = 150.0
"""Growth of the server's memory at its peak, with its helper processes."""
LOG_BYTES = 100_000
BODY_BYTES = 2000
"""Length of an error, which is one line of JSON."""
SETTLE_S = 1.0
"""After an attack, in which the other client still asks, and memory comes back."""

ATTACKS = [*hostile_schemas.ATTACKS, *hostile_requests.ATTACKS, *hostile_connections.ATTACKS]


@dataclass(frozen=True)
class Result:
    """What an attack did to its server: the attacker's statuses and time, the other client's, memory, log, states."""

    name: str
    item: str
    does: str
    attacker: Mapping[str, int]
    attacker_s: float
    other: Mapping[str, int]
    other_s: float
    lives: bool
    before_mb: float
    after_mb: float
    peak_mb: float
    log_bytes: int
    states_mb: float
    missed: Sequence[str]


def main() -> int:
    """Run the attacks, and write the figures; 1 if any target is missed."""
    parser = BENCHMARK.parser(writes=False)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", action="append", metavar="NAME", help="one attack; may be repeated (default: all)")
    parser.add_argument("--item", action="append", metavar="N", help="the attacks of this item; may be repeated")
    parser.add_argument("--engine", default="gguf", help="engine of the server (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--list", action="store_true", help="only list the attacks")
    options = BENCHMARK.options(parser)
    # So that a server does not outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    attacks = [attack for attack in ATTACKS if _is_chosen(attack, options)]
    if options.list:
        print("\n".join(f"{attack.item:3} {attack.name:26} {attack.does}" for attack in attacks))
        return 0
    if not attacks:
        parser.error(f"no attack {', '.join(options.only or options.item)}; see --list")
    manifest = read_manifest(options.bundle)
    names = Names(manifest.name, tuple(manifest.adapters))
    results = []
    for attack in attacks:
        results.append(measure(attack, options.bundle, names, options.engine))
        progress(f"{attack.name}: {', '.join(results[-1].missed) or 'ok'}")
    if options.json:
        figures = {"machine": this_machine(), "requests": [asdict(result) for result in results]}
        text = json.dumps(figures, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(table(results))
    return int(any(result.missed for result in results))


def measure(attack: Attack, bundle: Path, names: Names, engine: str) -> Result:
    """Run an attack while another client asks."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        options = ["--engine", engine, *attack.options]
        with attacked_server(bundle, names, work, options, attack.open_files) as server:
            before_mb, log_before = server.resident_mb, server.log.stat().st_size
            other = OtherClient(server.target.port, names.base)
            other.start()
            begin = time.monotonic()
            replies = attack.run(server.target)
            attacker_s = time.monotonic() - begin
            time.sleep(SETTLE_S)
            other.end()
            log_bytes = server.log.stat().st_size - log_before
            states_mb = sum(path.stat().st_size for path in (work / "states").glob("*")) / 1e6
            return Result(
                name=attack.name,
                item=attack.item,
                does=attack.does,
                attacker=dict(Counter(str(reply.status) for reply in replies)),
                attacker_s=round(attacker_s, 2),
                other=dict(other.statuses),
                other_s=round(other.longest_s, 2),
                lives=server.lives,
                before_mb=round(before_mb, 1),
                after_mb=round(server.resident_mb, 1),
                peak_mb=round(server.peak_mb, 1),
                log_bytes=log_bytes,
                states_mb=round(states_mb, 1),
                missed=missed(replies, other, server, before_mb, log_bytes),
            )


def missed(replies: Replies, other: OtherClient, server: Server, before_mb: float, log_bytes: int) -> list[str]:
    """The targets that an attack missed."""
    statuses = Counter(str(reply.status) for reply in replies)
    seconds = [reply.seconds for reply in replies]
    errors = [reply.body for reply in replies if isinstance(reply.status, int) and reply.status >= 400]
    checks = {
        f"other waits {other.longest_s:.1f} s": other.longest_s > OTHER_WAIT_S,
        f"other gets {', '.join(sorted(set(other.statuses) - {'200'}))}": set(other.statuses) != {"200"},
        f"request of {max(seconds):.1f} s": max(seconds) > REQUEST_S,
        "process ends": not server.lives,
        f"+{server.peak_mb - before_mb:.0f} MB": server.peak_mb - before_mb > GROWTH_MB,
        f"log of {log_bytes / 1e6:.1f} MB": log_bytes > LOG_BYTES,
        f"{statuses['500']} x 500": "500" in statuses,
        "error of many lines": any(b"\n" in body.strip() for body in errors),
        "error of many bytes": any(len(body) > BODY_BYTES for body in errors),
        **{status.removeprefix(WRONG): True for status in statuses if status.startswith(WRONG)},
    }
    return [what for what, is_missed in checks.items() if is_missed]


def table(results: Sequence[Result]) -> str:
    """The figures as Markdown."""
    columns = {
        "item": "{item}",
        "attack": "{does}",
        "attacker": "{statuses}",
        "s": "{attacker_s:.1f}",
        "other's longest wait": "{other_s:.2f} s",
        "before, after, peak MB": "{before_mb:.0f}, {after_mb:.0f}, {peak_mb:.0f}",
        "missed": "{missed}",
    }
    failed = sum(bool(result.missed) for result in results)
    return f"{markdown(map(_row, results), columns)}\n{failed} of {len(results)} attacks miss a target"


def _row(result: Result) -> dict[str, Any]:
    statuses = ", ".join(f"{count} x {status}" for status, count in result.attacker.items())
    return asdict(result) | {"missed": "; ".join(result.missed), "statuses": statuses}


def _is_chosen(attack: Attack, options: argparse.Namespace) -> bool:
    if options.only or options.item:
        return attack.name in (options.only or ()) or attack.item in (options.item or ())
    return True


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    sys.exit(main())
