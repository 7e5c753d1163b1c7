from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgetune_runtime.threads import machine

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TELL = "from edgetune_runtime.threads.machine import usable_cores, cpu_quota; print(usable_cores(), cpu_quota())"


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_a_system_without_cgroups_has_no_limits(tmp_path: Path) -> None:
    assert machine.cores_left(tmp_path) == CORES
    assert machine.usable_cores(tmp_path) == min(CORES, machine.MAX_THREADS)
    assert machine.cpu_quota(tmp_path) is machine.free_mb(tmp_path) is machine.others_running(tmp_path) is None
    assert machine.throttling(tmp_path) is machine.disturbance(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000 100000", 0.5), ("100000 100000", 1.0), ("150000 100000", 1.5), ("max 100000", None)]
)
def test_a_quota_of_less_than_two_cores_gives_one_thread(tmp_path: Path, quota: str, cores: float | None) -> None:
    files = {"proc/self/cgroup": "0::/box/app", "sys/fs/cgroup/box/app/cpu.max": "max 100000"}
    root = _write(tmp_path, {**files, "sys/fs/cgroup/box/cpu.max": quota})
    assert machine.cpu_quota(root) == cores
    assert machine.usable_cores(root) == (min(CORES, machine.MAX_THREADS) if cores is None else 1)


def test_the_quota_of_a_container_is_at_the_top_of_what_it_sees(tmp_path: Path) -> None:
    root = _write(tmp_path, {"proc/self/cgroup": "0::/of/the/host", "sys/fs/cgroup/cpu.max": "25000 50000"})
    assert machine.cpu_quota(root) == 0.5


def test_the_first_version_of_cgroups_has_quota_and_memory_in_files_of_its_own(tmp_path: Path) -> None:
    cpu, memory = "sys/fs/cgroup/cpu,cpuacct/a", "sys/fs/cgroup/memory/a"
    files = {
        "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a\n1:name=systemd:/a",
        f"{cpu}/cpu.cfs_quota_us": "70000",
        f"{cpu}/cpu.cfs_period_us": "100000",
        f"{memory}/memory.limit_in_bytes": "300000000",
        f"{memory}/memory.usage_in_bytes": "120000000",
        f"{memory}/memory.stat": "cache 1\ntotal_inactive_file 20000000",
        "proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 2000000 kB",
    }
    root = _write(tmp_path, files)
    assert machine.cpu_quota(root) == 0.7
    assert machine.free_mb(root) == 200.0
    (root / cpu / "cpu.cfs_quota_us").write_text("-1")
    (root / memory / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert machine.cpu_quota(root) is None
    assert machine.free_mb(root) == 2048.0


def test_memory_is_what_the_tightest_cgroup_leaves(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box/app",
        "proc/meminfo": "MemAvailable: 1000000 kB",
        "sys/fs/cgroup/box/app/memory.max": "max",
        "sys/fs/cgroup/box/app/memory.current": "5000000",
        "sys/fs/cgroup/box/memory.max": "500000000",
        "sys/fs/cgroup/box/memory.current": "450000000",
        "sys/fs/cgroup/box/memory.stat": "anon 7\ninactive_file 30000000",
    }
    root = _write(tmp_path, files)
    assert machine.free_mb(root) == 80.0
    (root / "sys/fs/cgroup/box/app/memory.high").write_text("45000000")
    assert machine.free_mb(root) == 40.0


def test_slow_cores_do_not_count(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    capacities = {f"sys/devices/system/cpu/cpu{core}/cpu_capacity": "1024" for core in cores}
    capacities[f"sys/devices/system/cpu/cpu{cores[-1]}/cpu_capacity"] = "530"
    expected = max(1, len(cores) - 1) if len(cores) > 1 else 1
    assert machine.usable_cores(_write(tmp_path / "arm", capacities)) == min(expected, machine.MAX_THREADS)
    hybrid = _write(tmp_path / "x86", {"sys/devices/cpu_core/cpus": f"{cores[0]}-{cores[0]},4096"})
    assert machine.usable_cores(hybrid) == 1
    foreign = _write(tmp_path / "foreign", {"sys/devices/cpu_core/cpus": "4096-4099"})
    assert machine.usable_cores(foreign) == min(CORES, machine.MAX_THREADS)


def test_load_and_throttling_are_named_in_one_line(tmp_path: Path) -> None:
    firmware = "sys/devices/platform/soc/soc:firmware/get_throttled"
    root = _write(tmp_path, {"proc/loadavg": "2.10 1.00 0.50 3/120 4711", firmware: "50005"})
    assert machine.others_running(root) == 2
    assert machine.throttling(root) == "too little voltage, throttled"
    told = machine.disturbance(root)
    assert told is not None
    assert told.startswith("2 other running threads on ")
    assert told.endswith("cores; too little voltage, throttled")


@pytest.mark.skipif(
    Path("/sys/devices/platform/soc/soc:firmware/get_throttled").exists(), reason="the board itself reports it"
)
def test_flags_that_only_the_firmwares_own_program_prints_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x50008\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.throttling() == "throttled by heat"
    assert machine.throttling(since_start=True) == "too little voltage, throttled"
    assert (machine.disturbance() or "").endswith("throttled by heat")


def test_no_more_threads_than_cores_are_taken() -> None:
    assert machine.threads_for(4096) == machine.cores_left()
    assert machine.threads_for(1) == 1
    assert machine.threads_for(None) == machine.usable_cores()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_is_bound_to_one_core_has_one_thread() -> None:
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); {TELL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "1"


@pytest.fixture
def half_a_core() -> Iterator[Path]:
    """A cgroup with a quota of half a core."""
    version_1 = Path("/sys/fs/cgroup/cpu")
    folder = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"edgetune-test-{os.getpid()}"
    try:
        folder.mkdir()
        name, text = ("cpu.cfs_quota_us", "50000") if version_1.is_dir() else ("cpu.max", "50000 100000")
        (folder / name).write_text(text)
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no cgroup with a CPU quota can be made here: {error}")
    yield folder
    folder.rmdir()


def test_a_process_with_half_a_core_has_one_thread(half_a_core: Path) -> None:
    code = f"open({str(half_a_core / 'cgroup.procs')!r}, 'w').write('0'); {TELL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0.5"]
