"""Draws plots into PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def subplots(out: Path, *shape: int, dpi: int, **options: Any) -> Iterator[Any]:  # noqa: ANN401 - matplotlib's own
    """The axes of a figure, which is saved at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
    yield axes
    figure.savefig(out, dpi=dpi)
    pyplot.close(figure)
