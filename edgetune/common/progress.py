"""Progress of long work: a bar on a terminal, one updating line in a notebook, plain lines elsewhere, or a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgetune_runtime.wording import printable
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

# Seconds between plain lines of a running step, and between updates of a notebook's line.
_LINE_EVERY_S = 10.0
_UPDATE_EVERY_S = 0.2


@dataclass(frozen=True)
class ProgressEvent:
    """What a running build, export, evaluation or comparison reports: a message, or the position in a step.

    `step` is the name of the step, such as `training command`, of which `done` of `total` parts are done; it is empty
    for a message alone. During training, the losses are the latest ones in nats, means over the learned predictions by
    the weights of their rows.
    """

    message: str = ""
    step: str = ""
    done: int = 0
    total: int = 0
    train_loss: float | None = None
    val_loss: float | None = None


OnProgress = Callable[[ProgressEvent], None]


class Step:
    """A step with a known number of parts; call `update` after each part. Losses can be set before it."""

    train_loss: float | None = None
    val_loss: float | None = None

    def __init__(self, label: str, total: int, show: Callable[[Step, str], object] = lambda _step, _note: None) -> None:
        self.label, self.total, self.done, self._show = label, total, 0, show

    def update(self, note: str = "", done: int | None = None) -> None:
        """Report that one more part is done, or `done` parts in total; `note` is a short text, such as the loss."""
        self.done = self.done + 1 if done is None else done
        self._show(self, note)


class _Lines:
    """Shows a line with the time that a step has left every `every_s` seconds."""

    def __init__(self, show: Callable[[str], object], every_s: float) -> None:
        self._show, self._every_s, self._shown = show, every_s, time.monotonic()
        self._start, self._first, self._last = self._shown, 0, 0

    def __call__(self, step: Step, note: str) -> None:
        if step.done > self._last + 1:
            self._first = step.done
        self._last, now = step.done, time.monotonic()
        if now - self._shown < self._every_s or step.done == self._first:
            return
        self._shown = now
        left_s = (now - self._start) / (step.done - self._first) * (step.total - step.done)
        self._show(f"{step.label}: {step.done}/{step.total} {note}, {left_s:.0f} s left")


class Progress:
    """Reports progress to `on_progress`, or without it on standard error; prints nothing if `quiet`.

    What `on_progress` raises ends the work.
    """

    def __init__(self, on_progress: OnProgress | None = None, *, quiet: bool = False) -> None:
        self._on_progress = on_progress
        # Rich would parse [brackets] as markup and rows.jsonl:100: as an emoji.
        self._console = Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line."""
        if self._on_progress is not None:
            self._on_progress(ProgressEvent(printable(text)))
        else:
            self._console.print(printable(text))

    @property
    def _on_terminal(self) -> bool:
        # FORCE_COLOR, which notebooks set, makes rich take a file or a pipe for a terminal.
        return self._console.is_terminal and bool(getattr(self._console.file, "isatty", bool)())

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Step]:
        """Show a step of `total` parts while the block runs."""
        if (report := self._on_progress) is not None:
            yield Step(
                label,
                total,
                lambda step, note: report(ProgressEvent(note, label, step.done, total, step.train_loss, step.val_loss)),
            )
        elif self._console.is_jupyter and not self._console.quiet:
            with _updating_line() as show:
                yield Step(label, total, _Lines(show, _UPDATE_EVERY_S))
        elif not self._on_terminal or self._console.quiet:
            yield Step(label, total, _Lines(self._console.print, _LINE_EVERY_S))
        else:
            label_column, note_column = (
                TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}")
            )
            columns = (label_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note_column)
            with RichBar(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task(label, total=total, note="")
                yield Step(label, total, lambda step, note: bar.update(task, completed=step.done, note=note))


@contextmanager
def _updating_line() -> Iterator[Callable[[str], object]]:
    """A line below a notebook's cell that each text replaces; it is empty at the end.

    Not rich's bar, which needs the package ipywidgets there.
    """
    from IPython.display import display  # noqa: PLC0415 - only in notebooks

    handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str) -> None:
        handle.update({"text/plain": text}, raw=True)

    try:
        yield show
    finally:
        show("")
