from __future__ import annotations

import pytest
from edgetune_runtime.errors import UsageError

from edgetune.common.spread import spread


def test_a_sorted_list_is_represented_in_all_its_parts() -> None:
    rows = [label for label in "abcdefg" for _ in range(100)]
    assert set(spread(rows, 7)) == set("abcdefg")
    assert spread(rows, 256) == spread(rows, 256) == sorted(spread(rows, 256))


def test_a_limit_that_is_not_reached_leaves_the_rows_as_they_are() -> None:
    assert spread([1, 2], 2) == spread([1, 2], None) == [1, 2]
    assert spread([], 3) == []
    with pytest.raises(UsageError, match="a limit of 0 rows leaves nothing to score; use at least 1"):
        spread([1], 0)
