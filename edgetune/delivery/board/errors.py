"""The error of a connection between host and board; the other errors are those of the runtime."""

from __future__ import annotations

from edgetune_runtime.errors import EdgetuneError


class UnreachableError(EdgetuneError):
    """A board or a package index cannot be reached, or the connection was lost."""

    exit_code = 8
