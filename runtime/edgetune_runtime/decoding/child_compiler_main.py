"""The program that `child_compiler` starts: compiles a grammar within limits, and writes llguidance's error, if any."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Read the request on standard input; a signal ends this process where it exceeds a limit."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    import llguidance  # noqa: PLC0415 - it is found on the path of the request

    if hasattr(os, "nice"):
        # Other requests are answered meanwhile.
        os.nice(5)
    tokenizer = llguidance.LLTokenizer("byte")
    _limit(request["cpu_s"], request["bytes"])
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, request["grammar"], log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())


def _limit(cpu_s: int, memory_bytes: int) -> None:
    """Limit what this process may use beyond what it has used."""
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415 - Windows has none

    used = resource.getrusage(resource.RUSAGE_SELF)
    max_s = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (max_s, max_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        max_bytes = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


if __name__ == "__main__":
    main()
