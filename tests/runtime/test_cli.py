from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, __version__
from edgetune_runtime.bundle import ERROR, STATES_FOLDER, ConfidenceCurve, Scope, UnsureRule, read_manifest
from edgetune_runtime.cli import machine
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.sizing import bench
from runtime.bundles import change_manifest, write_manifest
from runtime.conftest import LABELS, Run

PROMPT = "turn on the light"
RUN = [sys.executable, "-c", "import sys; from edgetune_runtime.cli import main; sys.exit(main())"]


def test_info_prints_the_manifest(run: Run, bundle: Path) -> None:
    code, out, _ = run("info", bundle, "--json")
    assert (code, out) == (0, (bundle / "manifest.json").read_text())
    code, out, err = run("info", bundle, "--verify")
    assert (code, err) == (0, "")
    names = ["bundle", "base", "adapter", "adapter", "adapter", "opening"]
    assert [line.split()[0] for line in out.splitlines()] == names
    assert "M parameters, f16, " in out


def test_info_counts_weights_beside_a_graph_once(run: Run, both_of: Callable[[str], Path]) -> None:
    bundle = both_of("llama")
    megabytes = sum(entry.bytes for entry in read_manifest(bundle).files.values()) / 1e6
    assert f", {megabytes:.1f} MB, " in run("info", bundle)[1].splitlines()[0]


def test_info_says_which_answers_have_a_confidence_and_what_becomes_of_unsure_ones(
    run: Run, sure_bundle: Path, tmp_path: Path
) -> None:
    home = Path(shutil.copytree(sure_bundle, tmp_path / "home"))
    about = {"unsure": asdict(UnsureRule(0.8, ERROR)), "scope": {"gguf": asdict(Scope("other", 0.0, 0.05, 0.81))}}
    change_manifest(home, lambda raw: raw["adapters"]["tone"].update(about))
    _, out, _ = run("info", home)
    lines = out.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("adapter   tone"))
    assert [line.strip() for line in lines[place + 1 : place + 4]] == [
        "confidence of answers of the kind value, question, label",
        "unsure below 0.8: error",
        "other in gguf: 81% of texts out of scope, 5% of the others",
    ]


def test_info_shows_how_the_bundle_would_be_opened(run: Run, bundle: Path) -> None:
    code, out, err = run("info", bundle, "--threads", "1", "--context-length", "32")
    assert (code, err) == (0, "")
    opening = out.splitlines()[-1]
    assert "engine gguf, 1 thread (normal), context 32 tokens, KV cache f16, " in opening
    with Runtime.open(bundle, threads=1, context_length=32, disk_mb=0) as runtime:
        assert (runtime.engine, runtime.threads, runtime.context_length) == ("gguf", 1, 32)
        assert loaded_bundle(runtime).options.kv == "f16"
    assert "KV cache q8_0, " in run("info", bundle, "--kv", "q8_0")[1]
    code, _, err = run("info", bundle, "--engine", "onnx")
    assert (code, err) == (5, "edgetune-run: the base has no file for engine 'onnx'; use one of: gguf\n")


def test_nothing_in_a_manifest_controls_the_terminal(run: Run, home: Path) -> None:
    escapes = {"quantization": "\x1b[2J", "values_by_type": {"gguf": {"\x1b]0;title\x07": 1}}}
    change_manifest(home, lambda raw: raw["base"].update(escapes))
    code, out, err = run("info", home)
    assert (code, err) == (0, "") and all(line.isprintable() for line in out.splitlines())
    change_manifest(home, lambda raw: raw.update(name="\x1b[2J"))
    code, out, err = run("info", home)
    assert (code, out) == (4, "") and err.removesuffix("\n").isprintable()


def test_a_damaged_state_is_a_warning_and_debug_shows_the_log(
    run: Run, prompted_of: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("generate", prompted_of("llama"), "--adapter", "one", "--prompt", PROMPT, "--max-tokens", 1)
    folder = ("--cache-folder", tmp_path)
    code, out, err = run(*options, *folder)
    assert (code, err) == (0, "")
    (state,) = tmp_path.glob("*.kv")
    state.write_bytes(b"damaged")
    text = f"dropped a saved state that is damaged or does not match its file name: {state}"
    assert run(*options, *folder) == (0, out, f"edgetune-run: WARNING: {text}\n")
    code, again, err = run(*options, *folder, "--debug")
    assert (code, again) == (0, out)
    assert "edgetune-run: INFO: opened " in err
    assert re.search("^edgetune-run: DEBUG: hit: .* from disk$", err, re.MULTILINE)


def test_generate_writes_the_answer_and_nothing_else(run: Run, bundle: Path, runtime: Runtime) -> None:
    answer = runtime.generate(PROMPT, adapter="command", max_tokens=6)
    options = ("generate", bundle, "--adapter", "command", "--prompt", PROMPT, "--max-tokens", 6)
    assert run(*options) == (0, f"{answer.text}\n", "")
    code, out, err = run(*options, "--json")
    told = json.loads(out)
    assert (code, err, told["text"], told["tokens"], told["stop_reason"]) == (0, "", answer.text, 6, "length")
    assert all(told[key] > 0 for key in ("ttft_ms", "tokens_per_s", "switch_us", "prompt_tokens"))
    # The first run left the state of the adapter's prompt on the disk.
    assert told["reused_tokens"] == loaded_bundle(runtime).call(PROMPT, "command").job.fixed > 0


def test_an_unsure_answer_is_named_on_standard_error(run: Run, sure_bundle: Path) -> None:
    rule = ("--prompt", PROMPT, "--min-confidence", 1)
    options = ("generate", sure_bundle, "--adapter", "command", "--max-tokens", 2, *rule)
    assert run(*options)[2] == "unsure: confidence unknown\n"
    assert run(*options, "--unsure", "base")[2] == "unsure: confidence unknown, instead: base\n"
    assert run(*options, "--json")[2] == ""
    label = ("classify", sure_bundle, "--adapter", "tone", *rule)
    confidence = json.loads(run(*label, "--json")[1])["confidence"]
    assert run(*label)[2] == f"unsure: confidence {confidence:.2f}\n"


def test_states_are_made_listed_and_deleted(run: Run, bundle: Path, tmp_path: Path) -> None:
    folder = ("--cache-folder", tmp_path / "kept")
    code, out, _ = run("warm", bundle, *folder, "--json")
    tokens = json.loads(out)
    assert (code, "command" in tokens) == (0, True)
    code, out, err = run("cache", "ls", *folder)
    assert code == 0
    assert f"home: command\t{tokens['command']} tokens" in out
    assert err.startswith(f"{len(tokens)} states, ")
    listed = json.loads(run("cache", "ls", *folder, "--json")[1])
    assert {entry["tokens"] for entry in listed} <= {*tokens.values()}
    assert run("cache", "clear", *folder)[1].startswith(f"deleted {len(listed)} states")
    assert json.loads(run("cache", "ls", *folder, "--json")[1]) == []


def test_warm_fails_if_the_states_cannot_be_saved(run: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = run("warm", bundle, "--cache-folder", tmp_path / "file/states")
    assert (code, out) == (1, "")
    assert err.endswith("of the states are not saved; give --cache-folder, a folder with space that you may write to\n")


@pytest.mark.usefixtures("no_home")
def test_warm_fails_without_a_cache_folder(run: Run, bundle: Path) -> None:
    code, _, err = run("warm", bundle)
    assert (code, "of the states are not saved; give --cache-folder" in err) == (1, True)


@pytest.mark.usefixtures("no_home")
def test_warm_needs_no_cache_folder_for_states_that_the_bundle_ships(run: Run, home: Path) -> None:
    told = json.loads(run("warm", home, "--cache-folder", home / STATES_FOLDER, "--json")[1])
    manifest = read_manifest(home)
    write_manifest(home, manifest.base, manifest.adapters)
    code, out, _ = run("warm", home, "--json")
    assert (code, json.loads(out)) == (0, told)


def test_a_cache_folder_of_another_user_is_named(run: Run, unreadable: Path) -> None:
    for action in ("ls", "clear"):
        code, _, err = run("cache", action, "--cache-folder", unreadable)
        assert (code, f"{unreadable}: Permission denied; check the path and its permissions" in err) == (2, True)


def test_generate_takes_sampling_options(run: Run, bundle: Path, runtime: Runtime) -> None:
    sampling: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repeat_penalty": 1.1}
    sampling["seed"] = 3
    answer = runtime.generate(PROMPT, max_tokens=9, **sampling)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    assert run("generate", bundle, "--prompt", PROMPT, "--max-tokens", 9, *flags)[1] == f"{answer.text}\n"
    stop = answer.text[3:5]
    ended = run("generate", bundle, "--prompt", PROMPT, "--max-tokens", 9, *flags, "--stop", stop)[1]
    assert ended == answer.text[: answer.text.index(stop)] + "\n"


def test_generate_adds_several_adapters_with_their_scales(run: Run, bundle: Path, runtime: Runtime) -> None:
    answer = runtime.generate(PROMPT, adapter={"tone": 0.5, "command": 0.25}, max_tokens=6)
    flags = ("--adapter", "tone", "--adapter", "command=0.25")
    assert run("generate", bundle, "--prompt", PROMPT, "--max-tokens", 6, *flags)[1] == f"{answer.text}\n"


def test_a_prompt_may_come_from_standard_input(
    run: Run, bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(f"read by the app\n{PROMPT}\n".encode()), encoding="utf-8")
    stdin.readline()
    monkeypatch.setattr(sys, "stdin", stdin)
    answer = runtime.generate(PROMPT, max_tokens=4)
    assert run("generate", bundle, "--prompt", "-", "--max-tokens", 4)[1] == f"{answer.text}\n"


def test_classify_sorts_labels_by_probability(run: Run, bundle: Path, runtime: Runtime) -> None:
    label, scores = runtime.classify(PROMPT, adapter="tone", exact=True)
    code, out, _ = run("classify", bundle, "--prompt", PROMPT, "--adapter", "tone", "--exact", "--json")
    assert code == 0
    found = {"label": label, "scores": pytest.approx(scores), "unseen": pytest.approx(0), "out_of_scope": False}
    assert json.loads(out) == found | {"confidence": None, "is_unsure": False}
    lines = run("classify", bundle, "--prompt", PROMPT, "--adapter", "tone", "--exact")[1].splitlines()
    rows = {name: float(score) for name, score in (line.split("\t") for line in lines)}
    assert next(iter(rows)) == label
    assert rows == pytest.approx(scores, abs=1e-3)
    assert list(rows.values()) == sorted(rows.values(), reverse=True)
    assert set(rows) == set(LABELS)
    named = json.loads(run("classify", bundle, "--prompt", PROMPT, "--labels", "on, off", "--json")[1])
    assert named["label"] in set(named["scores"]) <= {"on", "off"}
    assert sum(named["scores"].values()) + named["unseen"] == pytest.approx(1)


def chat(run: Run, monkeypatch: pytest.MonkeyPatch, text: str, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run("chat", *arguments)


def test_chat_answers_with_the_adapter_in_use(
    run: Run, bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [runtime.generate(PROMPT, adapter=name, max_tokens=4).text for name in (None, "tone", "command", None)]
    lines = [PROMPT, "/use tone", PROMPT, "/use command", PROMPT, "/base", "/new", PROMPT, "/quit", PROMPT]
    code, out, _ = chat(run, monkeypatch, "\n".join(lines), bundle, "--max-tokens", 4, "--json")
    assert (code, [json.loads(line)["text"] for line in out.splitlines()]) == (0, expected)


def test_chat_answers_all_lines_where_one_is_not_utf_8(
    run: Run, bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = PROMPT.encode(), b"stop\xff", PROMPT.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n/new\n".join(lines)), encoding="utf-8"))
    code, out, _ = run("chat", bundle, "--max-tokens", 4, "--json")
    expected = [runtime.generate(text, max_tokens=4).text for text in (PROMPT, "stop\ufffd", PROMPT)]
    assert (code, [json.loads(line)["text"] for line in out.splitlines()]) == (0, expected)


def test_chat_keeps_a_history_for_each_adapter(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [PROMPT, "/use tone", PROMPT, PROMPT, "/base", PROMPT, "/new", PROMPT]
    _, out, _ = chat(run, monkeypatch, "\n".join(lines), bundle, "--max-tokens", 4, "--json")
    lengths = [json.loads(line)["prompt_tokens"] for line in out.splitlines()]
    first, tone, tone_again, base_again, anew = lengths
    assert first == tone == anew < min(tone_again, base_again)


def test_chat_keeps_a_history_for_a_scale_of_1_where_another_one_is_the_adapters_own(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/use tone", PROMPT, "/use tone=1", PROMPT]
    _, out, _ = chat(run, monkeypatch, "\n".join(lines), bundle, "--max-tokens", 4, "--json")
    first, other = (json.loads(line)["prompt_tokens"] for line in out.splitlines())
    assert first == other


def test_chat_continues_after_an_error(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["/use tome", "/nothing", "/use", "stop " * 300, "/help", PROMPT]
    code, out, err = chat(run, monkeypatch, "\n".join(lines), bundle, "--max-tokens", 4, "--adapter", "tone")
    assert (code, out.count("\n")) == (0, 1)
    told = err.splitlines()
    assert "no adapter 'tome' in bundle" in told[1]
    assert "no command '/nothing'" in told[2]
    assert "no command '/use'" in told[3]
    assert "the context allows" in told[4]
    assert told[5].startswith("/use NAME")


def test_chat_continues_with_the_same_adapter_after_one_that_cannot_be_used(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [PROMPT, "/use whole=0.5", "/use auto", PROMPT]
    code, out, err = chat(run, monkeypatch, "\n".join(lines), bundle, "--max-tokens", 4, "--json", "--adapter", "tone")
    first, again = (json.loads(line)["prompt_tokens"] for line in out.splitlines())
    assert (code, again > first) == (0, True)
    told = err.splitlines()[1:]
    assert "adapter 'whole' is merged, so it cannot be scaled" in told[0]
    assert "has no router" in told[1]
    assert len(told) == 2


def test_chat_with_adapters_that_cannot_be_used_reads_no_line(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = chat(run, monkeypatch, "/quit", bundle, "--adapter", "whole=0.5")
    assert (code, out, "cannot be scaled" in err) == (5, "", True)


def test_bench_measures_everything_that_it_promises_and_each_figure_is_a_line(
    run: Run, home_of_both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STARTS", 1)
    # A rule that would end the measurement, if it applied.
    curves = {"gguf": {"value": asdict(ConfidenceCurve(3, 1.0))}}
    rule = {"confidence": curves, "unsure": asdict(UnsureRule(1.0, ERROR))}
    change_manifest(home_of_both, lambda raw: raw["adapters"]["command"].update(rule))
    code, out, err = run("bench", home_of_both, "--json")
    told = json.loads(out)
    assert (code, set(told)) == (
        0,
        {"load_ms", "switch_us", "ttft_ms", "decode_tokens_per_s", "rss_mb", "adapter_mb"}
        | {"start_ms", "state_mb", "state_restore_ms", "busy", "slow", "engine", "threads", "context_length"}
        | {"answer_ms", "tokens_per_step"},
    )
    assert (told["engine"], told["threads"], told["context_length"]) == ("gguf", 1, 256)
    assert isinstance(told["slow"], bool)
    assert told["busy"] is None or "\n" not in told["busy"]
    assert 0 < told["switch_us"]["p50"] <= told["switch_us"]["p99"]
    assert told["switch_us"]["p50"] < 1e3 * told["ttft_ms"]["cold"]
    assert set(told["ttft_ms"]) == {"cold", "after_switch", "restored"}
    assert min(*told["ttft_ms"].values(), told["state_mb"], told["state_restore_ms"]) > 0
    assert told["start_ms"] > told["ttft_ms"]["cold"]
    assert told["decode_tokens_per_s"]["base"] > 0
    assert set(told["decode_tokens_per_s"]["adapters"]) == {"command", "tone", "whole"}
    assert min(told["answer_ms"].values()) > 0
    assert set(told["tokens_per_step"]) == {"command", "tone", "whole"}
    files = (home_of_both / "adapters").rglob("*.gguf")
    assert told["adapter_mb"] == pytest.approx(sum(path.stat().st_size for path in files) / 1e6)
    assert told["rss_mb"] > 10
    assert "switching 1200 times" in err
    figures = dict(line.split("\t") for line in machine._lines(told))
    assert {"load_ms", "switch_us.p99", "decode_tokens_per_s.adapters.tone"} < set(figures)
    del figures["busy"], figures["slow"], figures["engine"]
    assert all(float(value) >= 0 for value in figures.values())


def test_each_error_is_one_line_with_its_exit_code(run: Run, bundle: Path, home: Path, tmp_path: Path) -> None:
    (home / "base/model.gguf").write_bytes(b"GGUF")
    prompt = ("--prompt", PROMPT)
    cases = [
        (2, ("generate", bundle)),
        (2, ("generate", bundle, *prompt, "--max-tokens", "many")),
        (2, ("generate", bundle, *prompt, "--max-tokens", "0")),
        (2, ("generate", bundle, *prompt, "--adapter", "tone=loud")),
        (2, ("generate", bundle, *prompt, "--adapter", "tone", "--adapter", "tone=0.2")),
        (2, ("classify", bundle, *prompt)),
        (2, ("generate", bundle, *prompt, "--engine", "onxx")),
        (2, ()),
        (2, ("generat", bundle)),
        # Not an abbreviation of --adapters-mb.
        (2, ("check", bundle, "--adapter", "1")),
        (3, ("generate", bundle, *prompt, "--adapter", "tome")),
        (3, ("info", tmp_path / "none")),
        (4, ("generate", home, *prompt)),
        (4, ("info", home, "--verify")),
        (5, ("generate", bundle, *prompt, "--adapter", "whole=0.5")),
    ]
    for expected, arguments in cases:
        code, out, err = run(*arguments)
        assert (code, out) == (expected, ""), (arguments, err)
        assert err.startswith("edgetune-run: ")
        assert err.count("\n") == 1


def test_debug_shows_the_traceback_before_the_line(run: Run, tmp_path: Path) -> None:
    code, _, err = run("info", tmp_path, "--debug")
    assert code == 3
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("edgetune-run: ")


def test_errors_of_the_system_are_one_line_too(run: Run, bundle: Path) -> None:
    code, _, err = run("info", "a" * 300)
    assert (code, err.endswith("/manifest.json: File name too long; check the path and its permissions\n")) == (2, True)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*RUN, "info", str(bundle)], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        6, "edgetune-run: no space left to write to the disk; free some space and run the command again\n",
    )  # fmt: skip


def test_closed_standard_streams_are_empty(bundle: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *RUN, "generate", str(bundle), "--prompt", "-"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unexpected_error_is_one_line_too(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "open", None)
    code, _, err = run("generate", bundle, "--prompt", PROMPT)
    assert (code, err.count("\n")) == (1, 1)
    assert "unexpected TypeError" in err


def test_help_and_version_are_on_standard_output(run: Run) -> None:
    assert run("--version")[:2] == (0, f"edgetune-run {__version__}\n")
    for command in ("info", "generate", "chat", "classify", "bench"):
        code, out, _ = run(command, "--help")
        assert (code, out.startswith(f"usage: edgetune-run {command}")) == (0, True)


def test_a_reader_that_leaves_early_is_no_error(bundle: Path) -> None:
    command = [*RUN, "generate", str(bundle), "--prompt", PROMPT, "--max-tokens", "200", "--temperature", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), told) == (0, b"")


# A shell without job control starts background jobs with SIGINT ignored.
@pytest.mark.parametrize("trap", ["", 'trap "" INT; '])
def test_an_interrupt_ends_in_130_and_one_line(bundle: Path, trap: str) -> None:
    command = ["sh", "-c", f'{trap}exec "$@"', "sh", *RUN, "chat", str(bundle)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    # Ready once it has told its adapters.
    assert "command, tone, whole" in process.stderr.readline()
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "edgetune-run: interrupted\n")


def test_reading_a_manifest_needs_no_engine_and_no_numpy(bundle: Path) -> None:
    probe = "import sys; sys.modules['llama_cpp'] = sys.modules['numpy'] = None; " + RUN[2].split("; ", 1)[1]
    command = [sys.executable, "-c", probe, "info", str(bundle), "--verify"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("bundle")


def test_an_engine_that_is_installed_is_named_where_another_is_not(both_of: Callable[[str], Path]) -> None:
    probe = "import sys; sys.modules['llama_cpp'] = None; " + RUN[2].split("; ", 1)[1]
    command = [sys.executable, "-c", probe, "generate", str(both_of("llama")), "--prompt", "play"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.endswith("under macOS), or use engine onnx\n")) == (5, True)
    for remedy in ('pip install "edgetune-runtime[gguf]"', "apt install g++", "xcode-select --install"):
        assert remedy in done.stderr


def test_doctor_reports_the_machine(run: Run) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("processor\t")
    assert "bundle" not in out


def test_doctor_tries_a_bundle_and_keeps_what_it_measures(run: Run, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "board.json"
    code, out, _ = run("doctor", bundle, "--calibrate", file, "--threads", 1, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["bundle"]["measured_tokens_per_s"]["decode"] > 0
    assert found["bundle"]["predicted_from"] == "the memory bandwidth measured here"
    assert found["bundle"]["memory_mb"]["needed"] > found["bundle"]["memory_mb"]["base weights"]
    assert found["libraries"]["edgetune-runtime"] == __version__
    assert found["libraries"].keys() >= {"llama-cpp-python", "onnxruntime"}
    assert isinstance(found["problems"], list)
    # Every build of llama.cpp on x86-64 and ARM that can run a model has repacking code.
    assert "REPACK" in found["llama_cpp"]["features"]
    assert found["llama_cpp"]["variant"]
    [figures] = json.loads(file.read_text())["engines"]["gguf"].values()
    assert all(value > 0 for value in figures.values())
    code, out, err = run("doctor", bundle, "--calibration", file, "--json")
    again = json.loads(out)
    assert (code, err) == (0, "")
    assert 1 <= again["bundle"]["threads"] <= again["cores"]["usable"]
    assert re.fullmatch(r"the figures given, of \w+ weights", again["bundle"]["predicted_from"])


def test_doctor_calibrates_nothing_that_is_refused(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert "refused" in json.loads(run("doctor", bundle, "--kv", "q5", "--json")[1])["bundle"]
    code, _, err = run("doctor", bundle, "--kv", "q5", "--calibrate", tmp_path / "board.json")
    assert (code, err.splitlines()[-1][:44]) == (2, "edgetune-run: gguf has no data type 'q5' for")
    code, _, err = run("doctor", bundle, "--calibrate", tmp_path)
    assert (code, err) == (2, f"edgetune-run: cannot write {tmp_path}; give a file in a folder that you may write to\n")


def test_doctor_reports_what_opening_would_refuse(run: Run, home: Path) -> None:
    with next((home / "base").glob("*.gguf")).open("r+b") as file:
        file.write(b"GONE")
    code, out, _ = run("doctor", home, "--json")
    found = json.loads(out)
    assert code == 0
    assert any(problem.startswith("refused: ") for problem in found["problems"])


def test_calibrating_without_a_bundle_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("doctor", "--calibrate", tmp_path / "board.json")
    assert code == 2 and "need a bundle" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--defer-to", "http://127.0.0.1:1/v1"], "only one of --defer-to and --defer-model is given"),
        (["--defer-timeout-s", 5], "--defer-timeout-s is given without --defer-to; give both, or neither"),
    ],
)
def test_half_a_bigger_model_is_refused(options: list[object], message: str, run: Run, bundle: Path) -> None:
    code, _, err = run("generate", bundle, "--prompt", "?", *options)
    assert code == 2
    assert message in err
