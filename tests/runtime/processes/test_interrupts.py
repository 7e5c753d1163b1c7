from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# It opens the terminal as the first one of its session, and so is sent SIGHUP when that is closed.
ON_TERMINAL = 'exec "$2" -c "$3" "$4" <"$1" >"$1" 2>&1'
WORK = """
import signal, sys, time
from pathlib import Path
from edgetune_runtime.processes.interrupts import end_on_interrupt, interrupt_on_termination
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests with nohup ignores it
end_on_interrupt()
interrupt_on_termination()
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    print("stopped", flush=True)
    Path(sys.argv[1]).write_text("saved")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
def test_work_is_saved_when_its_terminal_is_closed(tmp_path: Path) -> None:
    master, slave = os.openpty()
    command = ["sh", "-c", ON_TERMINAL, "sh", os.ttyname(slave), sys.executable, WORK, str(tmp_path / "work")]
    with subprocess.Popen(command, start_new_session=True) as process:
        assert os.read(master, 100).strip() == b"ready"
        os.close(slave)
        os.close(master)
        assert process.wait(20) == 0
    assert (tmp_path / "work").read_text() == "saved"
