"""Asks a bundle for its golden answers with the options that its board will use, before anything is sent there."""

from __future__ import annotations

from pathlib import Path

from edgetune_runtime import Runtime
from edgetune_runtime.errors import PromptTooLongError, VerificationError
from edgetune_runtime.inference.golden import compare
from edgetune_runtime.store.opening import Opening

from edgetune.common.progress import Progress


def require_golden(bundle: Path, engine: str, opening: Opening, progress: Progress) -> None:
    """Check that the adapters answer as built although the bundle is opened with other options than the build's.

    A board would refuse the kit otherwise. Raises VerificationError that names the options and what differs.
    """
    if opening.context_length is None and opening.kv is None:
        return
    options = " ".join(opening.words())
    progress.say(f"asking for golden answers with {options}")
    try:
        with Runtime.open(bundle, engine=engine, verify=False, disk_mb=0, contexts=1, **opening.changes) as runtime:
            different = [f"{name}: {answer}" for name, answer in compare(runtime) if answer.is_different]
    except PromptTooLongError as error:
        raise VerificationError(f"with {options}: {error.message}", "give a larger --context-length") from error
    if different:
        message = f"with {options} {len(different)} adapters answer differently than built: {', '.join(different)}"
        longer = [] if opening.context_length is None else ["give a larger --context-length"]
        finer = [] if opening.kv is None else ["leave --kv out, or see what it costs: edgetune evaluate --kv"]
        raise VerificationError(message, "; or ".join([*longer, *finer]))
