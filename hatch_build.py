"""Add edgetune-runtime, at the version being built, to the dependencies of edgetune."""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class RuntimeOfSameVersion(MetadataHookInterface):
    """The dependencies in pyproject.toml under this hook, and the runtime of the same version.

    Bundles are tested only with equal versions of both.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `dependencies`; hatchling has set `version` already."""
        runtime = f"edgetune-runtime[gguf,onnx,structured]=={metadata['version']}"
        metadata["dependencies"] = [runtime, *self.config["dependencies"]]
