from __future__ import annotations

import io
import logging
import time

import pytest
from edgetune_runtime.cli.log_lines import LineFormatter, RateFilter

Written = tuple[logging.Logger, io.StringIO]


@pytest.fixture
def written() -> Written:
    """A logger, and what it wrote."""
    out = io.StringIO()
    handler, logger = logging.StreamHandler(out), logging.Logger("a logger")
    handler.addFilter(RateFilter())
    handler.setFormatter(LineFormatter("%(message)s"))
    logger.addHandler(handler)
    return logger, out


def test_a_message_that_repeats_is_written_five_times_and_then_counted(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, out = written
    for number in range(100):
        logger.warning("a client sent %d", number)
    logger.warning("another one")
    assert out.getvalue().splitlines()[4:] == ["a client sent 4", "another one"]
    later_s = time.monotonic() + 20
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    logger.warning("a client sent %d", 100)
    assert out.getvalue().splitlines()[6:] == ["a client sent 100 (95 earlier messages were left out)"]


def test_control_characters_are_escaped_and_a_traceback_is_indented_and_cut(written: Written) -> None:
    logger, out = written
    try:
        raise ValueError("wrong\nERROR: \x1b[2J" + "x" * 100_000)
    except ValueError:
        logger.exception("sent %s", "\x1b[2J\nERROR: forged é\x00")
    first, *others = out.getvalue().splitlines()
    assert first == "sent \\x1b[2J\\nERROR: forged é\\x00"
    assert others[-2] == "  ValueError: wrong" and others[-1].startswith("  ERROR: \\x1b[2Jxxx")
    assert len(out.getvalue()) < 21_000 and all(line.startswith("  ") for line in others)
