"""The `route` key of a recipe: the router with which `adapter="auto"` chooses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgetune_runtime.bundle import AUTO, BASE, ERROR, ROUTER_WORDS
from edgetune_runtime.wording import suggestion
from pydantic import Field

from .part import RecipePart, Text
from .parts import Name


class RouteSpec(RecipePart):
    """A router, with which `adapter="auto"` chooses the adapter of a prompt. `route: true` has all defaults."""

    adapters: tuple[Name, ...] | None = None
    """The adapters to choose from. null: all."""
    below: Text | None = None
    """What answers a prompt that is of none of the tasks: `base`, the name of an adapter, or `error`. null: base, and
    error in a bundle that only classifies."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """If the likeliest task has a lower probability than this, the prompt belongs to none. null: 0.5, as the build
    shifts the odds such that this separates best, with at most 2 % of the validation rows lost."""

    def summary(self, adapters: Iterable[str]) -> str:
        """The adapters that the router chooses among, in one line."""
        threshold = "calibrated" if self.threshold is None else f"{self.threshold:g}"
        below = "" if self.below is None else f", below it {self.below}"
        return f"chooses among {', '.join(self.adapters or adapters)}; threshold {threshold}{below}"

    def problems(self, bundle: str, adapters: Mapping[str, object], *, generates: bool) -> list[str]:
        """Contradictions to the recipe's other keys, each with the remedy."""
        chosen = tuple(adapters) if self.adapters is None else self.adapters
        problems = [
            f"no adapter {name!r}; {suggestion(name, list(adapters))}" for name in chosen if name not in adapters
        ]
        if len(set(chosen)) < 2:
            problems.append(
                f"a router needs 2 adapters to choose from, not {len(set(chosen))}; add one, or remove route"
            )
        problems += [
            f"{name!r} cannot be a name here, as it has another meaning with route; choose another"
            for name in ROUTER_WORDS
            if name in adapters or name == bundle == AUTO
        ]
        answers = [*([BASE] if generates else []), ERROR, *adapters]
        if self.below is not None and self.below not in answers:
            problems.append(f"below is {self.below!r}; {suggestion(self.below, answers)}")
        return problems
