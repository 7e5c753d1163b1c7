"""Secrets of the user: in the environment, or typed."""

from __future__ import annotations

import os
import sys
from getpass import getpass

from edgetune_runtime.errors import UsageError


def secret_of_user(variable: str, prompt: str, need: str) -> str:
    """The secret in a variable of the environment, or else what the user types after the prompt.

    UsageError, which begins with what needs the secret, if the variable is not set and nobody is there.
    """
    secret = os.environ.get(variable)
    if secret is None and not sys.stdin.isatty():
        raise UsageError(f"{need}, and nobody is there to ask for it", f"set {variable}")
    return getpass(prompt) if secret is None else secret
