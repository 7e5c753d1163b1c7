"""A base with recurrent layers: what is reused of prompts, sessions and drafts, and that answers stay the same."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.cli.main import main
from edgetune_runtime.engines.gguf import needs
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.states.batches import CHUNK
from runtime.bundles import HYBRIDS
from runtime.engines.conftest import stop_next_step

LONG = "turn on the warm light in the hall and the kitchen " * 12


@pytest.fixture(params=HYBRIDS, ids="-".join)
def open_(request: pytest.FixtureRequest, prompted_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Runtime]:
    """Opens the bundle of a tiny hybrid with one context."""

    def make(**options: Any) -> Runtime:  # noqa: ANN401 - those of `Runtime.open`
        engine, arch = request.param
        folder = {"context_length": 512, "cache_folder": tmp_path}
        return Runtime.open(prompted_of(arch), engine=engine, contexts=1, **folder, **options)

    return make


def logits_of(runtime: Runtime, prompt: str) -> tuple[int, np.ndarray]:
    """The reused tokens, and the logits after a prompt."""
    call = loaded_bundle(runtime).call(prompt, "one")
    with call.lease() as context:
        found = context.run(call.job)
        return found.reused, found.logits.copy()


def test_prompts_that_begin_alike_share_their_first_batches(open_: Callable[..., Runtime]) -> None:
    with open_(cache_mb=0, disk_mb=0) as runtime:
        _, expected = logits_of(runtime, LONG + "now")
    with open_() as runtime:
        logits_of(runtime, LONG + "please, and stop the music")
        # Of the sequence, then of the state that was saved when another call came.
        for between in ([], ["play"]):
            for prompt in between:
                runtime.generate(prompt, adapter="two", max_tokens=2)
            reused, found = logits_of(runtime, LONG + "now")
            assert reused == CHUNK
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("switches", [False, True])
def test_a_session_goes_on_from_its_state(open_: Callable[..., Runtime], tmp_path: Path, switches: bool) -> None:
    # Texts whose tokens are those that were generated.
    answer: dict[str, Any] = {"choices": ["warm light", "red"]}
    with open_() as runtime:
        session = runtime.session("one")
        session.send("turn on the light", **answer)
        if switches:
            session.use("two")
        runtime.generate("play", adapter="two", max_tokens=2)
        before = session.send("and in the hall", **answer)
        session.save(tmp_path / "a.session")
        expected = session.send("stop", max_tokens=4)
        assert (before.timings.reused_tokens >= 30) == (not switches)
    with open_() as runtime:
        found = runtime.load_session(tmp_path / "a.session").send("stop", max_tokens=4)
        assert (found.text, found.timings.reused_tokens) == (expected.text, expected.timings.reused_tokens)


def test_drafts_are_accepted_and_rejected_and_change_no_answer(open_: Callable[..., Runtime]) -> None:
    prompts = ["turn on the light", "turn on the light in the hall", LONG]
    options: dict[str, Any] = {"adapter": "one", "max_tokens": 40}
    with open_(learn_drafts="off") as runtime:
        expected = [runtime.generate(prompt, logprobs=0, **options) for prompt in prompts]
        stop = expected[0].text[20:24]
        words = [runtime.generate(prompt, stop=stop, **options) for prompt in prompts]
    texts = [answer.text for answer in expected]
    with open_(learn_drafts="memory") as runtime:
        for prompt, answer in zip(prompts, expected, strict=True):
            # An answer that went on in another way after six tokens.
            tokens = [one.token for one in answer.logprobs or ()]
            past = loaded_bundle(runtime).call(prompt, "one").past
            assert past is not None
            past.keep([*tokens[:6], *(token ^ 1 for token in tokens[6:])])
        answers = [runtime.generate(prompt, **options) for prompt in prompts]
        assert [answer.text for answer in answers] == texts
        with loaded_bundle(runtime).call("play", None).lease() as context:
            undoes_steps = bool(context.engine.max_rollback)
        for timings in (answer.timings for answer in answers):
            assert (timings.drafted > timings.accepted > 0) == undoes_steps
        answers = [runtime.generate(prompt, **options) for prompt in prompts]
        assert [answer.text for answer in answers] == texts
        assert (sum(answer.timings.accepted for answer in answers) > 20) == undoes_steps
        stopped = [runtime.generate(prompt, stop=stop, **options) for prompt in prompts]
        assert [answer.text for answer in stopped] == [answer.text for answer in words]


@pytest.mark.parametrize("count", range(1, 6))
def test_an_answer_that_is_cancelled_within_a_draft_keeps_the_text_that_was_read(
    open_: Callable[..., Runtime], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"adapter": "one", "max_tokens": 40}
    with open_(learn_drafts="memory") as runtime:
        call, cancel = loaded_bundle(runtime).call("play", "one"), threading.Event()
        tokens = [one.token for one in runtime.generate("play", logprobs=0, **options).logprobs or ()]
        assert call.past is not None
        # A draft of which a part is rejected, so that the step cannot be cut once more.
        call.past.keep([*tokens[:6], *(token ^ 1 for token in tokens[6:])])
        stream = runtime.stream("play", cancel=cancel, **options)
        text = "".join(next(stream) for _ in range(count))
        cancel.set()
        with monkeypatch.context() as patch:
            stop_next_step(loaded_bundle(runtime).context()[0].engine, patch)
            text += "".join(stream)
        answer = stream.answer
    assert answer is not None
    assert (answer.stop_reason, answer.text) == ("cancelled", text)


def test_info_says_what_the_states_take_and_that_large_ones_have_no_drafts(
    prompted_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(prompted_of("lfm2"))
    for engine in ("gguf", "onnx"):
        assert main(["info", bundle, "--engine", engine]) == 0
        assert re.search(r"opening .*, recurrent states 0\.\d MB each$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(needs, "ROLLBACK_BYTES", 1)
    assert main(["info", bundle]) == 0
    assert "MB each, no drafts because rejected tokens could not" in capsys.readouterr().out
    with Runtime.open(bundle, learn_drafts="memory") as runtime:
        texts = {runtime.generate("turn on the light", adapter="one", max_tokens=20).text for _ in range(2)}
        answer = runtime.generate("turn on the light", adapter="one", max_tokens=20)
    assert (texts, answer.timings.drafted) == ({answer.text}, 0)
