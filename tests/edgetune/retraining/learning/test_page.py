"""The page of two bundles compared."""

from __future__ import annotations

from edgetune.retraining.learning.change import ScoredSet, change_between
from edgetune.retraining.learning.page import SHOWN, page_of_changes
from edgetune.tasks.evaluation import ScoredRow


def test_a_page_says_how_to_list_the_answers_that_it_leaves_out() -> None:
    before, after = (
        ScoredSet([ScoredRow(f"x:{n}", f"lamp {n}", "on", answer, score) for n in range(SHOWN + 2)], 0, 1.0)
        for answer, score in (("off", 0.0), ("on", 1.0))
    )
    changes = {"light": {"validation": change_between(before, after)}}
    page = page_of_changes("Lamps", "Packed.", changes, {"light": ""}, command="learn")
    assert page.count("<blockquote") == SHOWN
    assert "and 2 more; give <code>--json</code> in the same call of <code>edgetune learn</code> to list all." in page
