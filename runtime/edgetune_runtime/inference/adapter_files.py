"""The files of a bundle's adapters: where they are, checked when they are read, and what was read from them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

from edgetune_runtime.bundle import AdapterEntry, Manifest, NewAdapter, VerifiedFiles, digest_of_model, resolve
from edgetune_runtime.decoding.drafts import DraftTable, read_table
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError, VerificationError

from .opening_options import OpeningOptions, file_of
from .similarity import TrainingPrompts, read_prompts

T = TypeVar("T")


class AdapterFiles:
    """The files of the adapters in `manifest`, in the folder `bundle` unless they were added from another one.

    The folder is another one after the bundle was replaced as a whole.
    """

    def __init__(self, bundle: Path, manifest: Callable[[], Manifest], options: OpeningOptions) -> None:
        self._bundle, self._manifest, self._options = bundle, manifest, options
        self._own = {bundle}
        self._folders: dict[str, Path] = {}
        self._verified = VerifiedFiles()
        # With the entry that each was read for: an adapter of the name may have been replaced.
        self._drafts: dict[str, tuple[AdapterEntry, DraftTable]] = {}
        self._outputs: dict[str, tuple[AdapterEntry, OutputSpec]] = {}
        self._prompts: dict[str, tuple[AdapterEntry, TrainingPrompts]] = {}

    def put(self, name: str, folder: Path) -> None:
        """From now on an adapter's files are in this folder."""
        self._folders[name] = folder

    def folder_of(self, name: str) -> Path:
        """The folder in which an adapter's files are."""
        return self._folders.get(name, self._bundle)

    def own(self) -> list[str]:
        """The adapters that are in the bundle's own folder, or were in the one before."""
        return [name for name in self._manifest().adapters if self.folder_of(name) in self._own]

    def move(self, folder: Path, own: Collection[str]) -> None:
        """From now on the bundle is in this folder, and with it the files of the adapters in `own`, but no others."""
        others = [name for name in self._manifest().adapters if name not in own]
        self._folders = {name: self.folder_of(name) for name in others}
        self._own.add(folder)
        self._bundle = folder

    def weights_of(self, entry: AdapterEntry) -> str:
        """The name of an adapter's file for the engine; IncompatibleError without one."""
        return file_of(entry.files, self._options.engine, f"adapter {entry.name!r}")

    def digest_of(self, new: NewAdapter) -> str:
        """The digest that the states of a new adapter are kept under."""
        return digest_of_model(new.files, self.weights_of(new.entry))

    def reading(self, entry: AdapterEntry, file: str) -> AbstractContextManager[Path]:
        """The path of an adapter's file for a block that reads it, checked unless the options say otherwise."""
        folder = self.folder_of(entry.name)
        if not self._options.verify:
            return nullcontext(resolve(folder, file))
        return self._verified.reading(folder, self._manifest(), file)

    def output_of(self, entry: AdapterEntry) -> OutputSpec | None:
        """An adapter's output constraint."""
        if entry.output is None:
            return None
        return _remembered(self._outputs, entry, partial(_output_of, entry))

    def draft_of(self, entry: AdapterEntry, vocabulary: int) -> DraftTable | None:
        """An adapter's draft table, unless the options say that there are no drafts."""
        if not self._options.drafts or entry.draft is None:
            return None
        return _remembered(self._drafts, entry, partial(self._read_draft, entry, entry.draft, vocabulary))

    def training_prompts_of(self, entry: AdapterEntry) -> TrainingPrompts | None:
        """The states after an adapter's training prompts, if the bundle has them."""
        if entry.similarity is None:
            return None
        return _remembered(self._prompts, entry, partial(self._read_prompts, entry, entry.similarity))

    def drop(self, name: str) -> None:
        """Drop an adapter's draft table and training prompts from memory."""
        self._drafts.pop(name, None)
        self._prompts.pop(name, None)

    def forget(self, name: str) -> None:
        """Forget an adapter that was removed."""
        for table in (self._folders, self._drafts, self._outputs, self._prompts):
            table.pop(name, None)

    def _read_draft(self, entry: AdapterEntry, file: str, vocabulary: int) -> DraftTable:
        with self.reading(entry, file) as path:
            return read_table(path, self._manifest().base.tokenizer_sha256, vocabulary)

    def _read_prompts(self, entry: AdapterEntry, file: str) -> TrainingPrompts:
        with self.reading(entry, file) as path:
            return read_prompts(path)


def _remembered(cache: dict[str, tuple[AdapterEntry, T]], entry: AdapterEntry, read: Callable[[], T]) -> T:
    """What was read for this entry, or what `read` returns now."""
    cached = cache.get(entry.name)
    if cached is None or cached[0] is not entry:
        cached = cache[entry.name] = (entry, read())
    return cached[1]


def _output_of(entry: AdapterEntry) -> OutputSpec:
    try:
        return OutputSpec.from_json(entry.output or {})
    except UsageError as error:
        message = f"adapter {entry.name!r} has an invalid output: {error.message}"
        raise VerificationError(message, "build the bundle again") from error
