"""Measure a bundle on this machine: load time, switching, time to first token, decode speed and memory."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice, pairwise
from typing import Any, NamedTuple

from edgetune_runtime.bundle import MARK, bytes_of_model
from edgetune_runtime.engines.base import Engine
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.runtime import Runtime
from edgetune_runtime.threads.machine import disturbance, resident_mb

SWITCHES = 1200
ROUNDS = 3
STARTS = 5
RESTORES = 20
DECODE_STEPS = 48
ANSWER_TOKENS = 64
MESSAGES = ("What is the weather like outside today?", "Please turn down the heating in the kitchen a little.")


def measure(open_runtime: Callable[[], Runtime], progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure a bundle. `open_runtime` opens it without states on disk; each stage is reported to `progress`.

    `engine`, `threads` and `context_length` are those that the bundle was opened with. `load_ms` is the time to open it
    once, digests included, and for a bundle that is new here the child process. `switch_us` is the time of the switch
    call alone, over at least 1,000 calls. `ttft_ms` is the median time to first token of a short message after each
    adapter's own system prompt: with a cold cache (`cold`), and after switching back to an adapter that was used before
    (`after_switch`). `decode_tokens_per_s` is the median decode speed, token by token, and `share` that of an adapter
    divided by that of the base right before. `answer_ms` is the median time of an answer of at most 64 tokens, with the
    adapter's output constraint and drafts, and `tokens_per_step` its mean number of tokens per step after the prompt,
    per adapter: 0 for labels, which are not written. `rss_mb` is the resident memory of this process with all adapters
    except merged ones, `adapter_mb` the size of all adapters in this engine's format, both in 10^6 bytes. `state_mb` is
    the size of the largest state of a fixed prompt, `state_restore_ms` the median time to restore it. A figure that the
    bundle or the system cannot provide is None.

    `busy` names other load or throttling seen before the start, in one line, or is None. `slow` is true when the steps
    lacked cores or took much longer than the fastest ones. The figures are then not representative of the machine.
    """
    busy = disturbance()
    progress("opening the bundle")
    begin = time.perf_counter()
    runtime = open_runtime()
    load_ms = (time.perf_counter() - begin) * 1e3
    with runtime:
        entries = runtime.manifest.adapters.values()
        merged = [entry.name for entry in entries if entry.is_merged(runtime.engine)]
        switched = [entry.name for entry in entries if entry.name not in merged]
        progress(f"switching {SWITCHES} times")
        switch_us = _switches(runtime, switched) if switched else None
        progress("time to first token")
        ttft_ms = _first_tokens(runtime, switched) if switched else None
        state_mb, state_restore_ms = _state_restore(runtime, [None, *switched])
        progress("decode speed")
        base = _decode_speed(runtime, None)
        pairs = {name: _decode_speeds(runtime, name) for name in switched}
        rss_mb = resident_mb()
        pairs |= {name: _decode_speeds(runtime, name) for name in merged}
        speeds = [base, *(speed for pair in pairs.values() for speed in pair)]
        progress("whole answers")
        answers = {entry.name: _answers(runtime, entry.name) for entry in entries}
        sizes = [bytes_of_model(runtime.manifest.files, entry.files[runtime.engine]) for entry in entries]
        return {
            "engine": runtime.engine,
            "threads": runtime.threads,
            "context_length": runtime.context_length,
            "busy": busy,
            "slow": any(speed.slow for speed in speeds),
            "load_ms": load_ms,
            "switch_us": switch_us,
            "ttft_ms": ttft_ms,
            "state_mb": state_mb,
            "state_restore_ms": state_restore_ms,
            "decode_tokens_per_s": {
                "base": base.tokens_per_s,
                "adapters": {name: speed.tokens_per_s for name, (_, speed) in pairs.items()},
                "share": {name: speed.tokens_per_s / plain.tokens_per_s for name, (plain, speed) in pairs.items()},
            },
            "answer_ms": {name: answer.answer_ms for name, answer in answers.items()},
            "tokens_per_step": {name: answer.tokens_per_step for name, answer in answers.items()},
            "rss_mb": rss_mb,
            "adapter_mb": sum(sizes) / 1e6,
        }


class _AnswerFigures(NamedTuple):
    """The median time of an answer in ms, and the mean number of tokens per step."""

    answer_ms: float
    tokens_per_step: float


def _answers(runtime: Runtime, name: str) -> _AnswerFigures:
    times_ms, steps = [], []
    for message in MESSAGES * ROUNDS:
        begin = time.perf_counter()
        answer = runtime.generate(message, adapter=name, max_tokens=ANSWER_TOKENS, unsure=MARK)
        times_ms.append((time.perf_counter() - begin) * 1e3)
        steps.append(answer.timings.tokens_per_step)
    return _AnswerFigures(statistics.median(times_ms), statistics.fmean(steps))


def restored_ms(runtime: Runtime) -> float | None:
    """Median time to first token of a short message when the fixed prompts' states are restored from disk.

    None if all adapters are merged. The runtime must have a folder for states; this calls `Runtime.warm` to fill it.
    """
    entries = runtime.manifest.adapters.values()
    names = [entry.name for entry in entries if not entry.is_merged(runtime.engine)]
    runtime.warm()
    return _median_ttft_ms(runtime, names) if names else None


def _median_ttft_ms(runtime: Runtime, names: list[str]) -> float:
    """Median time to first token of a short message after the states in memory were dropped."""
    times_ms = []
    for name in names * ROUNDS:
        runtime.clear_cache()
        times_ms.append(_ttft_ms(runtime, name, MESSAGES[0]))
    return statistics.median(times_ms)


def _ttft_ms(runtime: Runtime, name: str | None, message: str) -> float:
    return runtime.generate(message, adapter=name, max_tokens=1, unsure=MARK).timings.ttft_ms


def start_ms(command: Sequence[str]) -> float:
    """Median time from the start of a process to the first byte of its answer on standard output."""
    times_ms = []
    for _ in range(STARTS):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            times_ms.append((time.perf_counter() - begin) * 1e3)
            process.stdout.read()
        if process.returncode:
            raise EdgetuneError(f"{' '.join(command)} exited with {process.returncode}", "run it to see why")
    return statistics.median(times_ms)


def _state_restore(runtime: Runtime, names: list[str | None]) -> tuple[float | None, float | None]:
    """Size in MB of the largest state of a fixed prompt, and the median time in ms to restore it."""
    jobs = [call for name in names if (call := loaded_bundle(runtime).call(MESSAGES[0], name)).job.is_worth_a_state]
    if not jobs:
        return None, None
    call = max(jobs, key=lambda call: call.job.fixed)
    fixed = replace(call.job, tokens=call.job.tokens[: call.job.fixed], fixed=0)
    with call.lease(fixed) as context:
        context.run(fixed)
        state = context.engine.save_state()
        times_ms = []
        for _ in range(RESTORES):
            begin = time.perf_counter()
            context.engine.restore_state(state)
            times_ms.append((time.perf_counter() - begin) * 1e3)
        context.reset()
    return len(state) / 1e6, statistics.median(times_ms)


def _switches(runtime: Runtime, names: list[str]) -> dict[str, float]:
    context, _ = loaded_bundle(runtime).context()
    scales = {name: loaded_bundle(runtime).context(name)[1] for name in names}
    loaded = loaded_bundle(runtime).adapters.names
    active: list[Mapping[str, float]] = [{}, *(scales[name] for name in names if name in loaded)]
    with context.hold():
        times = sorted(_timed_us(context.engine, adapters) for adapters in islice(cycle(active), SWITCHES))
        # The context does not know that its engine was switched.
        context.reset()
    return {"p50": statistics.median(times), "p99": times[int(len(times) * 0.99)]}


def _timed_us(engine: Engine, adapters: Mapping[str, float]) -> float:
    begin = time.perf_counter_ns()
    engine.activate(adapters)
    return (time.perf_counter_ns() - begin) / 1e3


def _first_tokens(runtime: Runtime, names: list[str]) -> dict[str, float]:
    cold = _median_ttft_ms(runtime, names)
    after_switch: list[float] = []
    # Calling the base in between makes each call a switch even with a single adapter.
    for number in range(ROUNDS + 1):
        message = MESSAGES[number % 2]
        _ttft_ms(runtime, None, message)
        times_ms = [_ttft_ms(runtime, name, message) for name in names]
        if number:
            after_switch += times_ms
    return {"cold": cold, "after_switch": statistics.median(after_switch)}


class _Speed(NamedTuple):
    """Median decode speed, and whether the steps were slow; see `measure`."""

    tokens_per_s: float
    slow: bool


def _decode_speeds(runtime: Runtime, name: str) -> tuple[_Speed, _Speed]:
    """The base's decode speed and an adapter's, one right after the other."""
    return _decode_speed(runtime, None), _decode_speed(runtime, name)


def _decode_speed(runtime: Runtime, name: str | None) -> _Speed:
    context, active = loaded_bundle(runtime).context(name)
    with context.hold():
        capacity = context.engine.capacity(active)
        tokens = context.engine.tokenizer.tokenize(MESSAGES[0])[: capacity // 2]
        token = int(context.start(active, tokens).logits.argmax())
        steps = min(DECODE_STEPS, capacity - len(tokens))
        ends_s = [time.perf_counter()]
        for _ in range(steps):
            context.extend([token])
            ends_s.append(time.perf_counter())
        median_s = statistics.median(end - begin for begin, end in pairwise(ends_s))
        return _Speed(1 / median_s, context.is_slow)
