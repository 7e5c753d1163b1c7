"""Runs commands on a board through the user's own ssh: their configuration, agent and known hosts, and no password."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from edgetune_runtime.errors import EdgetuneError, UnreachableError, VerificationError
from edgetune_runtime.wording import printable

from edgetune.delivery.board.main import PROGRAM

from .limited import LimitedProcess
from .target import Target

SHORT_S = 120.0
"""Seconds for a command that has little to do."""
# ssh's own exit code, when it cannot connect or lost the connection.
_SSH_FAILED = 255
_MOST_PROBLEM_BYTES = 10_000
_OPTIONS = (
    "BatchMode=yes",
    "ClearAllForwardings=yes",
    "ConnectTimeout=15",
    # A board that lost its power or network is noticed after 15 seconds.
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ControlMaster=auto",
    # Ends the shared connection by itself if this process is killed.
    "ControlPersist=60",
    "RemoteCommand=none",
    # A board must not use the keys or the screen of whoever deploys to it.
    "ForwardAgent=no",
    "ForwardX11=no",
)
# What ssh prints on standard error, the problem in words, and the remedy; {ssh} is a command to try by hand.
_REASONS: tuple[tuple[str, type[EdgetuneError], str, str], ...] = (
    (
        "HOST IDENTIFICATION HAS CHANGED",
        VerificationError,
        "the host key is not the one in {known_hosts}",
        "if the board was set up again, remove the old key with `ssh-keygen -R {entry}`; otherwise do not connect",
    ),
    (
        "Host key verification failed|authenticity of host",
        VerificationError,
        "the host key is not known",
        "run `{ssh}` once and compare the fingerprint with the board's",
    ),
    (
        "Permission denied|Too many authentication failures",
        UnreachableError,
        "the login was refused",
        "deploy needs a key: run `ssh-copy-id`, or add the key to ssh-agent, until `{ssh}` works without a password",
    ),
    ("Could not resolve hostname", UnreachableError, "no such host", "check the name, or use the IP address"),
    ("Connection refused", UnreachableError, "ssh was refused", "check the port, and that sshd runs on the board"),
    (
        "timed out|No route to host|Network is unreachable|Host is down",
        UnreachableError,
        "no answer",
        "check that the board is on and that `{ssh}` works",
    ),
    (
        "Bad configuration option|Bad owner or permissions|terminating, .* bad configuration",
        UnreachableError,
        "ssh cannot read its configuration",
        "correct it until `{ssh}` works",
    ),
)


class Connection:
    """A connection that several commands share; use it in a `with` block.

    Every method raises UnreachableError when the board cannot be reached or the connection is lost, VerificationError
    when the host key is wrong, and the error of the command, by its exit code, when the command fails.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._folder = tempfile.TemporaryDirectory(prefix="edgetune-")
        # Paths of sockets have at most 104 bytes, of which ssh itself adds 17.
        control = ("-o", f"ControlPath={self._folder.name}/c")
        port = () if target.port is None else ("-p", str(target.port))
        options = tuple(word for option in _OPTIONS for word in ("-o", option))
        self._words = ("ssh", "-T", *options, *control, *port)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            command = [*self._words, "-O", "exit", "--", self.target.host]
            subprocess.run(command, capture_output=True, check=False, timeout=10)
        self._folder.cleanup()

    def run(self, command: Sequence[str], data: Iterable[bytes] = (), *, limit_s: float = SHORT_S) -> str:
        """Run a command with `data` on its standard input; its standard output, without control characters.

        The command is killed `limit_s` after it took the last of its input, and when it prints more than 1 MB.
        """
        with self._started(command, limit_s) as process:
            self._write(process, data)
            return self._result(process)

    def converse(
        self, command: Sequence[str], start: str, answer: Callable[[str], Iterable[bytes]], *, limit_s: float
    ) -> str:
        """Run a command that first prints a line with this start, and send it the answer to the rest of the line.

        Output and limits are those of `run`.
        """
        with self._started(command, limit_s) as process:
            line = process.wait_for(start.encode())
            if line is not None:
                self._write(process, answer(line.decode(errors="replace")))
            return self._result(process)

    @contextmanager
    def _started(self, command: Sequence[str], limit_s: float) -> Iterator[LimitedProcess]:
        # A login shell may print something without an end of line first.
        words = [*self._words, "--", self.target.host, f"echo; {shlex.join(command)}"]
        try:
            process = LimitedProcess(words, limit_s)
        except FileNotFoundError as error:
            raise UnreachableError("ssh is not installed", "Debian: apt install openssh-client") from error
        try:
            yield process
        except BaseException:
            process.kill()
            raise

    @staticmethod
    def _write(process: LimitedProcess, data: Iterable[bytes]) -> None:
        # Why a command stopped reading is in its exit code.
        with contextlib.suppress(BrokenPipeError):
            for part in data:
                process.write(part)

    def _result(self, process: LimitedProcess) -> str:
        """The output of a command that ends, or its error."""
        code, out, problems = process.finish()
        text = _printable(problems[-_MOST_PROBLEM_BYTES:])
        if process.exceeded:
            message = f"{self.target}: a command on the board {process.exceeded}"
            remedy = "see what its login shell prints, and what keeps it busy"
            if process.exceeded.startswith("did not take"):
                remedy = "check the network; the same command resumes"
            raise UnreachableError(message, remedy)
        # A negative code is a signal that ended ssh.
        if code == _SSH_FAILED or code < 0:
            raise self._lost(text)
        if code:
            # Lines before the error say what the command was doing.
            last = (text.splitlines() or [f"a command ended with exit code {code}"])[-1]
            raise _class_of(code)(f"{self.target}: {last.removeprefix(f'{PROGRAM}: ')}")
        return _printable(out)

    def _lost(self, text: str) -> EdgetuneError:
        target = self.target
        port = () if target.port is None else ("-p", str(target.port))
        name = target.host.rpartition("@")[2]
        words = {
            "ssh": shlex.join(["ssh", *port, target.host]),
            "entry": shlex.quote(name if target.port in (None, 22) else f"[{name}]:{target.port}"),
            "known_hosts": (re.findall(r"Offending .*? key in (\S+)", text) or ["known_hosts"])[0],
        }
        for pattern, cls, problem, remedy in _REASONS:
            if re.search(pattern, text):
                return cls(f"{target}: {problem.format(**words)}", remedy.format(**words))
        reason = f" ({text.splitlines()[-1]})" if text else ""
        return UnreachableError(f"{target}: the connection was lost{reason}", "run the command again, it resumes")


def _class_of(code: int) -> type[EdgetuneError]:
    """The class of errors with this exit code."""
    classes = (cls for cls in EdgetuneError.__subclasses__() if "exit_code" in vars(cls))
    return next((cls for cls in classes if cls.exit_code == code), EdgetuneError)


def _printable(data: bytes) -> str:
    """Text of the board that cannot control the terminal, without empty lines."""
    lines = (printable(line).strip() for line in data.decode(errors="replace").split("\n"))
    return "\n".join(line for line in lines if line)
