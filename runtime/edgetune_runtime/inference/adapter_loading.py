"""Loads adapters from a bundle's files: into the engine of its base, and merged ones as models of their own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from edgetune_runtime import engines
from edgetune_runtime.bundle import AdapterEntry, Manifest
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.engines.needs import adapter_size
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.events import Event
from edgetune_runtime.serving.classifier import Classifier
from edgetune_runtime.serving.merged import MakeRoom
from edgetune_runtime.serving.pool import Pool

from .adapter_files import AdapterFiles
from .opening import open_merged
from .opening_options import OpeningOptions

_LOG = logging.getLogger(__name__)


class BundleAdapterLoader:
    """The `AdapterLoader` of the adapters in `manifest` and of the base that is `running`, in at most `contexts`."""

    def __init__(
        self,
        running: Pool | Classifier,
        files: AdapterFiles,
        manifest: Callable[[], Manifest],
        options: OpeningOptions,
        contexts: Callable[[], int],
    ) -> None:
        self._running, self._files, self._manifest = running, files, manifest
        self._options, self._contexts = options, contexts

    def load(self, entry: AdapterEntry) -> None:
        """Check an adapter and load it; a merged one has a model of its own, and torch's are in the model."""
        if self._is_merged(entry) or not entry.files:
            return
        begin = time.perf_counter()
        with self._files.reading(entry, self._files.weights_of(entry)) as path:
            self._running.load(entry, path, self._manifest().base.fingerprint)
        elapsed_s = time.perf_counter() - begin
        _LOG.debug("loaded adapter %r in %.1f ms", entry.name, elapsed_s * 1e3)
        self._options.emit(Event("loaded", entry.name, seconds=elapsed_s, bytes=self.bytes_of(entry)))

    def unload(self, name: str) -> None:
        """Drop an adapter from the engine, and what was read beside it."""
        self._running.unload(name)
        self._files.drop(name)
        _LOG.debug("dropped adapter %r from memory", name)

    def bytes_of(self, entry: AdapterEntry, manifest: Manifest | None = None) -> int:
        """The memory that an adapter takes with what is read beside it; none where its model is one of its own.

        One that is not there yet needs a `manifest` with its files.
        """
        manifest = self._manifest() if manifest is None else manifest
        engine = self._options.engine
        if self._is_merged(entry) or engine not in entry.files:
            return 0
        files = manifest.files
        shared = sum(files[file].bytes for file in entry.shared_files)
        if engine not in engines.names_with_needs():
            return files[entry.files[engine]].bytes + shared
        size = adapter_size(manifest, entry, engine)
        return size.file_bytes + shared + self._contexts() * size.modules * engines.load_needs(engine).COST.module_bytes

    def open_merged(self, name: str, make_room: MakeRoom) -> Pool:
        """Check and open the model of a merged adapter; `make_room` and errors as those of `open_merged`."""
        begin, manifest = time.perf_counter(), self._manifest()
        assert isinstance(self._running, Pool)
        base, folder = self._running.first.shared, self._files.folder_of(name)
        file = self._files.weights_of(manifest.adapter(name))
        pool = open_merged(folder, manifest, file, self._options, base=base, make_room=make_room)
        with self._running.tokenizer() as tokenizer:
            if _described(pool.first.engine.tokenizer) != _described(tokenizer):
                pool.close()
                message = f"merged adapter {name!r} has another vocabulary or chat template than the base"
                raise IncompatibleError(message, "build the bundle again")
        elapsed_s = time.perf_counter() - begin
        _LOG.info("loaded merged adapter %r in %.2f s", name, elapsed_s)
        self._options.emit(Event("loaded", name, seconds=elapsed_s))
        return pool

    def _is_merged(self, entry: AdapterEntry) -> bool:
        return entry.is_merged(self._options.engine)


def _described(tokenizer: Tokenizer) -> tuple[object, ...]:
    return tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.chat_template
