"""Trains the router of a bundle, and measures it: how often prompts get to their task, and others to none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from edgetune_runtime.bundle import BASE, CLASSIFY, ERROR, GENERATE, GENERATION, RoutedCall
from edgetune_runtime.inference.routing.classifier import PromptClassifier, probabilities
from numpy.typing import NDArray

from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.shipping.exported import TrainedRouter
from edgetune.tasks.negatives import GENERAL_REQUESTS, scrambled
from edgetune.tasks.task import Task

from .fit import fit
from .prompts import TaskPrompts, prompts_of

_MAX_PROMPTS, _MAX_PER_TASK = 20_000, 500
_SCRAMBLED = 300
_MAX_ROUNDS = 6
"""Tasks that are left out in turn to measure what becomes of the prompts of unknown ones."""
_EVEN = 0.5
_SHIFTS = [step / 10 for step in range(-60, 61)]
_MOST_LOST, _LEAST_LOST, _GOAL = 0.02, 0.01, 0.97
"""Shares of the validation prompts: those that may be taken for prompts of none, where so many are right, and else."""
_DISTINCT = 0.9
"""Share of the validation prompts of a task with labels that must not look like those of a task without."""


def train_router(recipe: Recipe, tasks: Sequence[Task], progress: Progress) -> TrainedRouter | None:
    """The router of the recipe, None if it has none; takes a second. The same rows give the same router."""
    if recipe.route is None:
        return None
    chosen = recipe.route.adapters or tuple(recipe.adapters)
    prompts = [prompts_of(task) for task in tasks if task.name in chosen]
    threshold = _EVEN if recipe.route.threshold is None else recipe.route.threshold
    classifiers, calls = {}, {}
    for call, group in _groups(prompts, generates=recipe.task == GENERATION, progress=progress):
        classifiers[call], calls[call] = _trained(group, threshold)
        progress.say(f"router: {call} chooses among {', '.join(calls[call].adapters)}: {described(calls[call])}")
    below = recipe.route.below or (BASE if recipe.task == GENERATION else ERROR)
    return TrainedRouter(classifiers, calls, below)


def described(call: RoutedCall) -> str:
    """The figures of a kind of call in words."""
    right = ", ".join(f"{share:.1%} of {name}" for name, share in call.right.items())
    return f"{right} right, {call.none_found:.1%} of other prompts found (threshold {call.threshold:g})"


def _groups(
    prompts: Sequence[TaskPrompts], *, generates: bool, progress: Progress
) -> Iterator[tuple[str, Sequence[TaskPrompts]]]:
    """The tasks among which each kind of call chooses."""
    if generates:
        yield GENERATE, _without_unclear(prompts, progress)
    labelled = [task for task in prompts if task.has_labels]
    if labelled:
        yield CLASSIFY, labelled


def _without_unclear(prompts: Sequence[TaskPrompts], progress: Progress) -> Sequence[TaskPrompts]:
    """Leave out tasks with labels whose prompts look like those of tasks without: a prompt alone cannot decide."""
    if len({task.has_labels for task in prompts}) < 2:
        return prompts
    odds, expected = _validation(prompts, _fitted(prompts, GENERAL_REQUESTS))
    clear = []
    for number, task in enumerate(prompts):
        share = (odds.argmax(1) == number)[expected == number].mean()
        if task.has_labels and share < _DISTINCT:
            reason = f"{1 - share:.0%} of its validation prompts look like those of other tasks"
            progress.say(f"router: {GENERATE} leaves out {task.name}, which has labels, as {reason}")
        else:
            clear.append(task)
    return clear


def _trained(tasks: Sequence[TaskPrompts], threshold: float) -> tuple[PromptClassifier, RoutedCall]:
    """The classifier of these tasks, and its figures.

    Its odds are shifted on the validation prompts and on those of none, such that an even chance separates both best.
    """
    classifier = _fitted(tasks, GENERAL_REQUESTS)
    (odds, expected), others = _validation(tasks, classifier), _odds_of_others(tasks)

    def routed(shift: float, threshold: float) -> NDArray[np.bool_]:
        chances = probabilities(odds + shift)
        is_kept: NDArray[np.bool_] = (chances.argmax(1) == expected) & (chances.max(1) >= threshold)
        return is_kept

    def rejected(shift: float, threshold: float) -> float:
        return float((probabilities(others + shift).max(1) < threshold).mean())

    most = max(routed(shift, _EVEN).mean() for shift in _SHIFTS)
    limit = max(most - _MOST_LOST, min(most - _LEAST_LOST, _GOAL))
    candidates = [shift for shift in _SHIFTS if routed(shift, _EVEN).mean() >= limit]
    shift = max(candidates, key=lambda each: routed(each, _EVEN).mean() + rejected(each, _EVEN))
    is_kept = routed(shift, threshold)
    right = {task.name: round(float(is_kept[expected == number].mean()), 4) for number, task in enumerate(tasks)}
    shifted = replace(classifier, biases=classifier.biases + np.float32(shift))
    return shifted, RoutedCall(tuple(right), threshold, right, round(rejected(shift, threshold), 4))


def _validation(
    tasks: Sequence[TaskPrompts], classifier: PromptClassifier
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The log odds of the validation prompts, a row each, and the number of the task that each is from."""
    odds = [classifier.log_odds(prompt) for task in tasks for prompt in task.validation]
    return np.stack(odds), np.repeat(np.arange(len(tasks)), [len(task.validation) for task in tasks])


def _odds_of_others(tasks: Sequence[TaskPrompts]) -> NDArray[np.float32]:
    """The log odds of prompts that a classifier did not learn from and that are of none of its tasks, a row each.

    Each classifier leaves out a task, whose prompts are then of none, and half of the general requests.
    """
    rows = []
    rounds = tasks[:_MAX_ROUNDS] if len(tasks) > 1 else [None, None]
    for number, left_out in enumerate(rounds):
        learned, unseen = GENERAL_REQUESTS[number % 2 :: 2], GENERAL_REQUESTS[1 - number % 2 :: 2]
        classifier = _fitted([task for task in tasks if task is not left_out], learned)
        prompts = [*unseen, *(() if left_out is None else left_out.validation)]
        rows += [classifier.log_odds(prompt) for prompt in prompts]
    missing = np.float32(-np.inf)
    return np.stack([np.append(row, [missing] * (len(tasks) - len(row))) for row in rows])


def _fitted(tasks: Sequence[TaskPrompts], general: Sequence[str]) -> PromptClassifier:
    rng, count = random.Random(0), min(_MAX_PER_TASK, _MAX_PROMPTS // len(tasks))
    prompts = [rng.sample(task.train, min(count, len(task.train))) for task in tasks]
    per_task = max(1, _SCRAMBLED // len(tasks))
    changed = [prompt for group in prompts for prompt in scrambled(group, per_task, rng)]
    return fit(prompts, [general, changed])
