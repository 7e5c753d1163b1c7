"""Reads text that may be JSON."""

from __future__ import annotations

import json
from typing import Any


def json_or_none(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a text in JSON; None for null and for any other text, also one that is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
