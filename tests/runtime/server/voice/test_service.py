"""The Wyoming service, asked by the protocol's own client."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.cli import main
from edgetune_runtime.inference.asynchronous import AsyncRuntime
from edgetune_runtime.server.binding import bind
from edgetune_runtime.server.settings import ServerLimits
from edgetune_runtime.server.voice.service import MAX_BYTES, WyomingService, run
from runtime.stores import switch_to
from wyoming.asr import Transcript
from wyoming.client import AsyncClient
from wyoming.event import Event
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop, NotHandled
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong

Ask = Callable[[str], Awaitable[None]]


def asked(runtime: Runtime, ask: Ask, **limits: float) -> None:
    """Run `ask(uri)` while the service runs with the first adapter."""

    async def both() -> None:
        service = WyomingService(
            AsyncRuntime(runtime),
            runtime.adapters[0],
            ("en",),
            max_tokens=12,
            deadline_s=20,
            limits=ServerLimits(**limits),
        )  # type: ignore[arg-type]
        with bind("127.0.0.1", 0) as listening:
            serving = asyncio.create_task(run(service, listening, lambda: None))
            try:
                await asyncio.wait_for(ask(f"tcp://127.0.0.1:{listening.getsockname()[1]}"), 30)
            finally:
                serving.cancel()
                with suppress(asyncio.CancelledError):
                    await serving

    asyncio.run(both())


async def events(client: AsyncClient, until: str) -> list[Event]:
    """The events up to one of this type."""
    found: list[Event] = []
    while not found or found[-1].type != until:
        event = await client.read_event()
        assert event is not None, [event.type for event in found]
        found.append(event)
    return found


def test_a_transcript_is_answered_piece_by_piece_and_whole(runtime: Runtime) -> None:
    wanted = runtime.generate("turn on the light", adapter=runtime.adapters[0], max_tokens=12).text

    async def ask(uri: str) -> None:
        async with AsyncClient.from_uri(uri) as client:
            # Two on one connection, as Home Assistant does.
            for number in range(2):
                await client.write_event(Transcript("turn on the light", context={"turn": number}).event())
                first, *pieces, whole, _ = await events(client, HandledStop().event().type)
                assert HandledStart.is_type(first.type)
                assert "".join(HandledChunk.from_event(piece).text for piece in pieces) == wanted
                assert Handled.from_event(whole) == Handled(wanted, {"turn": number})

    asked(runtime, ask)


def test_the_service_describes_its_adapter_and_answers_a_ping(runtime: Runtime) -> None:
    async def ask(uri: str) -> None:
        async with AsyncClient.from_uri(uri) as client:
            await client.write_event(Describe().event())
            (event,) = await events(client, "info")
            (program,) = Info.from_event(event).handle
            assert [model.name for model in program.models] == runtime.adapters[:1]
            assert program.supports_handled_streaming
            await client.write_event(Ping("there?").event())
            (event,) = await events(client, "pong")
            assert Pong.from_event(event).text == "there?"

    asked(runtime, ask)


def test_a_prompt_that_does_not_fit_is_not_handled_and_says_why(runtime: Runtime) -> None:
    async def ask(uri: str) -> None:
        async with AsyncClient.from_uri(uri) as client:
            await client.write_event(Transcript("light " * 2000).event())
            *_, event = await events(client, "not-handled")
            assert "context" in str(NotHandled.from_event(event).text)
            await client.write_event(Transcript("turn on the light").event())
            await events(client, "handled-stop")

    asked(runtime, ask)


def test_a_version_that_the_path_is_switched_to_is_taken_over(bundle: Path, fewer: Path, tmp_path: Path) -> None:
    with Runtime.open(switch_to(tmp_path / "device", "first", bundle), contexts=1, disk_mb=0) as runtime:

        async def ask(uri: str) -> None:
            switch_to(tmp_path / "device", "second", fewer)
            while "tone" in runtime.adapters:
                await asyncio.sleep(0.02)
            async with AsyncClient.from_uri(uri) as client:
                await client.write_event(Transcript("turn on the light").event())
                await events(client, "handled-stop")

        asked(runtime, ask)


@pytest.mark.parametrize(
    "data",
    [
        json.dumps({"type": "transcript", "data_length": 10 * MAX_BYTES}).encode() + b"\n",
        json.dumps({"type": "audio-chunk", "payload_length": 10 * MAX_BYTES}).encode() + b"\n",
        b"x" * (3 * MAX_BYTES),
        b"[" * (MAX_BYTES // 2) + b"\n",
        b'{"type": "ping", "data": {"text": "\\ud800"}}\n',
        b"[]\n",
        b'{"type": "transcript"}\n',
        b'{"type": "transcript", "data": {"text": 7}}\n',
    ],
)
def test_invalid_events_close_only_their_own_connection(runtime: Runtime, data: bytes) -> None:
    async def ask(uri: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(uri.rpartition(":")[2]))
        writer.write(data)
        with suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        writer.close()
        async with AsyncClient.from_uri(uri) as client:
            await client.write_event(Transcript("turn on the light").event())
            await events(client, "handled-stop")

    asked(runtime, ask)


@pytest.mark.parametrize("leaves", [True, False])
def test_neither_a_client_that_leaves_within_an_event_nor_the_end_of_the_service_logs_a_traceback(
    runtime: Runtime, leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:

        async def ask(uri: str) -> None:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", int(uri.rpartition(":")[2]))))
            if leaves:
                client.sendall(b'{"type": "transcript", "data_length": 100}\n{"text"')
                client.shutdown(socket.SHUT_WR)
                assert await asyncio.to_thread(client.recv, 1) == b""
            else:
                client.sendall(b'{"type": "transcript", "data": {"text": "turn on the light"}}\n')
                assert await asyncio.to_thread(client.recv, 1)

        asked(runtime, ask)
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_idle_clients_make_room_for_others(runtime: Runtime) -> None:
    async def ask(uri: str) -> None:
        port = int(uri.rpartition(":")[2])
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        async with AsyncClient.from_uri(uri) as client:
            await client.write_event(Transcript("turn on the light").event())
            await events(client, "handled-stop")
        closed = 0
        for reader, writer in idle:
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.05):
                    closed += await reader.read() == b""
            writer.close()
        assert closed >= 16

    asked(runtime, ask, connections=4)


def test_a_client_is_dropped_that_sends_no_event_in_time_but_not_one_that_was_answered(runtime: Runtime) -> None:
    async def ask(uri: str) -> None:
        async with AsyncClient.from_uri(uri) as client:
            await client.write_event(Ping().event())
            await events(client, "pong")
            reader, writer = await asyncio.open_connection("127.0.0.1", int(uri.rpartition(":")[2]))
            writer.write(b'{"type": ')
            async with asyncio.timeout(5):
                with suppress(ConnectionError):
                    assert await reader.read() == b""
            writer.close()
            await asyncio.sleep(0.3)
            await client.write_event(Ping().event())
            await events(client, "pong")

    asked(runtime, ask, client_s=0.2)


def test_a_client_that_does_not_read_is_dropped(runtime: Runtime) -> None:
    async def ask(uri: str) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(uri.rpartition(":")[2]), limit=1)
        ping = json.dumps({"type": "ping", "data": {"text": "x" * 60_000}}).encode() + b"\n"
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(20):
                while True:
                    writer.write(ping)
                    await writer.drain()
        writer.close()

    asked(runtime, ask, client_s=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "none"], "no adapter 'none'"),
        ([], "has several adapters"),
        (["--adapter", "plain", "--uri", "tcp://0.0.0.0:0"], "others can reach 0.0.0.0"),
        (["--adapter", "plain", "--uri", "127.0.0.1:5"], "is not an address"),
        (["--adapter", "plain", "--uri", "tcp://127.0.0.1:70000"], "is not an address"),
        (["--adapter", "plain", "--languages", "en,,de,"], "--languages 'en,,de,' has an empty name"),
        (["--adapter", "plain", "--max-tokens", "0"], "max_tokens 0 is not an integer of at least 1"),
        (["--adapter", "plain", "--deadline-s", "0"], "deadline_s is 0.0; give a number of seconds above 0"),
    ],
)
def test_a_wrong_command_ends_in_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with Runtime.open(bundle) as runtime:
        given = [runtime.adapters[0] if argument == "plain" else argument for argument in arguments]
    assert main(["wyoming", str(bundle), *given]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_the_command_listens_on_ipv6_too(bundle: Path) -> None:
    try:
        bind("::1", 0).close()
    except UsageError:
        pytest.skip("there is no IPv6")
    adapter = next(iter(read_manifest(bundle).adapters))
    command = [sys.executable, "-m", "edgetune_runtime", "wyoming", str(bundle), "--uri", "tcp://[::1]:0", "--json"]
    with subprocess.Popen([*command, "--adapter", adapter], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            uri = json.loads(process.stdout.readline())["uri"]
            assert uri.startswith("tcp://[::1]:")
            asyncio.run(answer_of(uri))
        finally:
            process.terminate()
        assert process.wait(30) == 0


async def answer_of(uri: str) -> None:
    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Transcript("turn on the light").event())
        await events(client, "handled-stop")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_the_command_prints_its_address_reloads_its_bundle_at_a_hang_up_and_stops_on_a_signal(
    home: Path, tmp_path: Path
) -> None:
    adapter = next(iter(read_manifest(home).adapters))
    command = [sys.executable, "-m", "edgetune_runtime", "wyoming", str(home), "--uri", "tcp://127.0.0.1:0", "--json"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--adapter", adapter], text=True, **pipes) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            uri = json.loads(process.stdout.readline())["uri"]
            assert uri.startswith("tcp://127.0.0.1:")
            asyncio.run(answer_of(uri))
            home.rename(tmp_path / "gone")
            process.send_signal(signal.SIGHUP)
            told = process.stderr.readline()
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert f"cannot reload the adapters of {home}: {home / 'manifest.json'}: No such file or directory; check" in told
