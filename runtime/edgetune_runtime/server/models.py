"""Maps model names to the base, an adapter, combined adapters (`A:0.7+B:0.3`), a rewriter or the router's choice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from edgetune_runtime.bundle import AUTO, CLASSIFY, GENERATE, Manifest, bytes_of_model, digest_of_model
from edgetune_runtime.inference.adapter_choice import Adapters
from edgetune_runtime.inference.routing.router import Route
from edgetune_runtime.text.chat import Prompt
from edgetune_runtime.wording import first_of

from .fields import Fields
from .problems import RequestError

Kind = Literal["base", "adapter", "several", "rewriter", "router"]
"""What a model answers with; `several` are combined adapters, `router` the adapter that it chooses."""

_LATEST = ":latest"


def base_name(name: str) -> str:
    """A model's name without the tag that Ollama's clients add."""
    return name.removesuffix(_LATEST)


@dataclass(frozen=True)
class ModelInfo:
    """A model as the APIs list it: its name, its parent's (None for the base), and digest and size of its files."""

    kind: Kind
    name: str
    parent: str | None
    digest: str
    bytes: int


class Models:
    """The models of a bundle, as its files for one engine; and those of rewriters, which are listed as the base is.

    `route` chooses the adapter of a prompt for the model `auto`, which a bundle with a router has. `hidden` are the
    names that rewriters share with other models, and with each other: such a name means the rewriter.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: str,
        rewriters: Sequence[str] = (),
        route: Callable[[Prompt], Route] | None = None,
    ) -> None:
        self._route, router = route, manifest.router
        self.manifest, self.engine, self._rewriters = manifest, engine, frozenset(rewriters)
        has_router = self._routes(GENERATE) or self._routes(CLASSIFY)
        taken = (manifest.name, *manifest.adapters, *([AUTO] if has_router else []))
        self.hidden = [name for name in rewriters if name in taken or rewriters.count(name) > 1]
        base = None if manifest.name in manifest.adapters else manifest.name
        files = {name: entry.files.get(engine) for name, entry in manifest.adapters.items()}
        infos = [] if base is None else [self._info("base", base, manifest.base.files[engine])]
        infos += [self._info("adapter", name, file) for name, file in files.items() if file is not None]
        infos += [self._info("router", AUTO, router.file)] if router is not None and has_router else []
        infos += [self._info("rewriter", name, manifest.base.files[engine]) for name in rewriters]
        self.listed: Mapping[str, ModelInfo] = {info.name: info for info in infos}

    @property
    def created(self) -> datetime:
        """When the bundle was built; the beginning of 1970 if its manifest does not say."""
        try:
            created = datetime.fromisoformat(self.manifest.created)
        except ValueError:
            return datetime.fromtimestamp(0, UTC)
        return created if created.tzinfo is not None else created.replace(tzinfo=UTC)

    def info(self, name: str) -> ModelInfo:
        """A listed model or combined adapters by name; RequestError (404) if there is no such model."""
        plain_name = base_name(name)
        if plain_name in self.listed:
            return self.listed[plain_name]
        scales = self.adapters(name)
        if not isinstance(scales, Mapping) or not scales.keys() <= self.listed.keys():
            raise self._unknown(name)
        parts = [self.listed[part] for part in scales]
        text = "+".join(sorted(f"{part.digest}:{scales[part.name]}" for part in parts))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return ModelInfo("several", plain_name, self.manifest.name, digest, sum(part.bytes for part in parts))

    def choice_of(self, fields: Fields, prompts: Sequence[Prompt]) -> tuple[str, Adapters, Route | None]:
        """The model's name in a request, its adapters, which a member `adapters` may give instead, and the route.

        For `auto` the name is that of the model that the router chose for the prompt.
        """
        name = fields.needed_text("model")
        chosen = self.adapters(name)
        if fields.values.get("adapters") is None:
            return self._routed(prompts) if chosen == AUTO and self._routes(GENERATE) else (name, chosen, None)
        if chosen is not None:
            message = f"adapters are given, and model {name!r} is an adapter"
            raise RequestError(message, f"give model {self.manifest.name!r}, or no adapters", param="adapters")
        return name, self._listed(fields), None

    def adapters(self, name: str, call: str = GENERATE) -> Adapters:
        """The adapters of a model name; RequestError (404) if there is no such model, and for one of other calls."""
        plain_name = base_name(name)
        if plain_name in self._rewriters:
            return None
        if plain_name in self.manifest.adapters or (plain_name == AUTO and self._routes(call)):
            return plain_name
        if plain_name == self.manifest.name:
            return None
        if plain_name in self.listed:
            other = "/v1/classify" if call == GENERATE else "a chat"
            raise RequestError(f"model {name!r} is not for such requests", f"use it for {other}", param="model")
        scales: dict[str, float] = {}
        for part in plain_name.split("+"):
            adapter, colon, scale = part.partition(":")
            if adapter not in self.manifest.adapters or adapter in scales:
                raise self._unknown(name)
            scales[adapter] = self._scale(scale, name) if colon else self.manifest.adapters[adapter].scale
        return scales

    def _routes(self, call: str) -> bool:
        """Whether the bundle's router chooses the adapter of such calls."""
        router = self.manifest.router
        return self._route is not None and router is not None and call in router.calls

    def _routed(self, prompts: Sequence[Prompt]) -> tuple[str, Adapters, Route | None]:
        if not prompts:
            return AUTO, None, None
        if isinstance(prompts[0], str):
            message = f"model {AUTO!r} needs messages, as a raw prompt has none to choose by"
            raise RequestError(message, "use the chat route, or name a model", param="model")
        assert self._route is not None
        route = self._route(prompts[0])
        return route.adapter or self.manifest.name, route.adapter, route

    def _listed(self, fields: Fields) -> Adapters:
        value = fields.values["adapters"]
        if isinstance(value, dict):
            scales = Fields(value, "adapters")
            scale_by_name = {name: scales.number(name) for name in value}
        else:
            scale_by_name = dict.fromkeys(fields.texts("adapters"))
        for name in scale_by_name:
            if name not in self.manifest.adapters:
                names = first_of([*self.manifest.adapters], 20, ", ") or "none"
                raise RequestError(f"no adapter {name!r}", f"choose from: {names}", status=404, param="adapters")
        return {
            name: self.manifest.adapters[name].scale if scale is None else scale
            for name, scale in scale_by_name.items()
        } or None

    def _scale(self, text: str, name: str) -> float:
        try:
            scale = float(text)
        except ValueError:
            raise self._unknown(name) from None
        if not math.isfinite(scale):
            raise self._unknown(name)
        return scale

    def _unknown(self, name: str) -> RequestError:
        remedy = f"choose one of: {first_of([*self.listed], 20, ', ')}"
        return RequestError(f"model {name!r} not found", remedy, status=404, param="model", code="model_not_found")

    def _info(self, kind: Kind, name: str, file: str) -> ModelInfo:
        files, parent = self.manifest.files, None if kind == "base" else self.manifest.name
        return ModelInfo(kind, name, parent, digest_of_model(files, file), bytes_of_model(files, file))
