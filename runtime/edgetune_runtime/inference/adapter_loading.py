"""Loads adapters from a bundle's files: into the engine of its base, and merged ones as models of their own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from edgetune_runtime import engines
from edgetune_runtime.bundle import AdapterEntry, Manifest, bytes_of_model
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.engines.needs import adapter_size
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.events import Event
from edgetune_runtime.serving.classifier import Classifier
from edgetune_runtime.serving.pool import Pool

from .adapter_files import AdapterFiles
from .opening import open_merged
from .opening_options import OpeningOptions, context_mb

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
        if entry.is_merged(self._options.engine) or not entry.files:
            return
        begin = time.perf_counter()
        with self._files.reading(entry, self._files.weights_of(entry)) as path:
            # Ctrl-C may have left another one of this name.
            self._running.unload(entry.name)
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
        if entry.is_merged(engine) or engine not in entry.files:
            return 0
        files = manifest.files
        shared = sum(files[file].bytes for file in entry.shared_files)
        if engine not in engines.names_with_needs():
            return files[entry.files[engine]].bytes + shared
        size = adapter_size(manifest, entry, engine)
        return size.file_bytes + shared + self._contexts() * size.modules * engines.load_needs(engine).COST.module_bytes


class MergedModelLoader:
    """The `AdapterLoader` of the merged adapters in `manifest`: it opens the model of each, which are in `pools`."""

    def __init__(
        self,
        running: Pool | Classifier,
        files: AdapterFiles,
        manifest: Callable[[], Manifest],
        options: OpeningOptions,
    ) -> None:
        self._running, self._files, self._manifest, self._options = running, files, manifest, options
        self.pools: dict[str, Pool] = {}

    def load(self, entry: AdapterEntry) -> None:
        """Check and open the model of a merged adapter; errors as those of `open_merged`."""
        begin, name = time.perf_counter(), entry.name
        assert isinstance(self._running, Pool)
        # As above.
        self.unload(name)
        base, folder, file = self._running.first.shared, self._files.folder_of(name), self._files.weights_of(entry)
        pool = open_merged(folder, self._manifest(), file, self._options, base=base)
        with self._running.tokenizer() as tokenizer:
            if _described(pool.first.engine.tokenizer) != _described(tokenizer):
                pool.close()
                message = f"merged adapter {name!r} has another vocabulary or chat template than the base"
                raise IncompatibleError(message, "build the bundle again")
        self.pools[name] = pool
        elapsed_s = time.perf_counter() - begin
        _LOG.info("loaded merged adapter %r in %.2f s", name, elapsed_s)
        self._options.emit(Event("loaded", name, seconds=elapsed_s))

    def unload(self, name: str) -> None:
        """Close the model of an adapter."""
        pool = self.pools.pop(name, None)
        if pool is not None:
            pool.close()
            _LOG.info("closed merged adapter %r", name)

    def close(self) -> None:
        """Close all models after the calls of other threads end."""
        for pool in self.pools.values():
            pool.close()

    def bytes_of(self, entry: AdapterEntry) -> int:
        """The size of an adapter's model and one context."""
        manifest = self._manifest()
        weights = bytes_of_model(manifest.files, self._files.weights_of(entry))
        return weights + int(context_mb(manifest, self._options) * 1e6)


def _described(tokenizer: Tokenizer) -> tuple[object, ...]:
    return tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.chat_template
