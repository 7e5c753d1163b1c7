"""Wording that the error messages of several modules share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

COPY_FILE_AGAIN = "build or copy the file again"
COPY_BUNDLE_AGAIN = "build or copy the bundle again"
ONNX_NEEDS = ("ONNX bundles need", '"edgetune-runtime[onnx]"')
"""Of `importing`."""
CLOSED = ("the runtime is closed", "open the bundle again")
"""Message and remedy of the UsageError after `close`."""

# C0 and C1, ends of lines, changes of the writing direction, and halves of characters.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with a space for each character that could control a terminal."""
    return _CONTROL.sub(" ", text)


def shortened(text: str, max_characters: int = 300) -> str:
    """`text` in one line of at most this length."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= max_characters else f"{line[: max_characters - 1]}…"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` is probably a misspelling of."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return near[0] if near else None


def suggestion(name: str, names: Sequence[str]) -> str:
    """The remedy for an unknown name: the most similar one of `names`, or else all of them."""
    near = nearest(name, names)
    return f"did you mean {near!r}?" if near else f"choose one of: {', '.join(names)}"


def first_of(items: Sequence[str], max_items: int = 3, separator: str = "; ") -> str:
    """The first items in one line, whatever is in them, and the number of the others."""
    more = len(items) - max_items
    return printable(separator.join(items[:max_items])) + (f" and {more} more" if more > 0 else "")
