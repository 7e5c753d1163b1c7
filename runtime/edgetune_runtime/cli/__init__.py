"""The command line of `edgetune-run`."""

from .main import main

__all__ = ["main"]
