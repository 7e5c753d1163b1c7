"""Progress on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from edgetune_runtime.wording import printable
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

# Seconds between plain lines of a running step.
_LINE_EVERY_S = 10.0


class Step:
    """A step with a known number of parts; call `update` after each part."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0

    def update(self, note: str = "", done: int | None = None) -> None:
        """Report that one more part is done, or `done` parts in total; `note` is a short text, such as the loss."""
        self.done = self.done + 1 if done is None else done


class _PlainStep(Step):
    def __init__(self, label: str, total: int, console: Console) -> None:
        super().__init__(label, total)
        self._console, self._start = console, time.monotonic()
        self._printed, self._first = self._start, 0

    def update(self, note: str = "", done: int | None = None) -> None:
        jumped = done is not None and done > self.done + 1
        super().update(note, done)
        if jumped:
            self._first = self.done
        now = time.monotonic()
        if now - self._printed < _LINE_EVERY_S or self.done == self._first:
            return
        self._printed = now
        left_s = (now - self._start) / (self.done - self._first) * (self.total - self.done)
        self._console.print(f"{self.label}: {self.done}/{self.total} {note}, {left_s:.0f} s left")


class _BarStep(Step):
    def __init__(self, label: str, total: int, bar: RichBar) -> None:
        super().__init__(label, total)
        self._bar = bar
        self._task = bar.add_task(label, total=total, note="")

    def update(self, note: str = "", done: int | None = None) -> None:
        super().update(note, done)
        self._bar.update(self._task, completed=self.done, note=note)


class Progress:
    """Reports progress on standard error; prints nothing if `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        # Rich would parse [brackets] as markup and rows.jsonl:100: as an emoji.
        self._console = Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(printable(text))

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Step]:
        """Show a step of `total` parts while the block runs."""
        if not self._console.is_terminal or self._console.quiet:
            yield _PlainStep(label, total, self._console)
            return
        label_column, note_column = (
            TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}")
        )
        columns = (label_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note_column)
        with RichBar(*columns, console=self._console, transient=True) as bar:
            yield _BarStep(label, total, bar)
