"""`edgetune learn BUNDLE --log FILE`: adapters with the corrections of users, if they got no worse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from edgetune_runtime.errors import UsageError, VerificationError

from .arguments import AsJson, BundlePath, Quiet, check_not_read, check_page, data_option, output_option, print_json
from .changes import print_changes

if TYPE_CHECKING:
    from edgetune.retraining.learning.learn import Learned


def learn(
    bundle: BundlePath,
    *,
    log: Annotated[
        list[Path],
        data_option(
            metavar="FILE", help="A log of `edgetune-run serve --log-answers`, or completed questions; repeatable."
        ),
    ],
    recipe: Annotated[
        Path | None,
        data_option(metavar="RECIPE", help="The recipe with the old rows (default: the one beside BUNDLE)."),
    ] = None,
    into: Annotated[
        Path | None, output_option(metavar="NEW", help="The folder of the new bundle (default: BUNDLE itself).")
    ] = None,
    ask: Annotated[
        int, data_option(min=0, metavar="N", help="First ask about N answers: those called wrong, and the least sure.")
    ] = 0,
    questions: Annotated[
        Path | None,
        output_option(
            metavar="FILE", help="Only write the N answers of --ask to FILE, to be completed and given as --log."
        ),
    ] = None,
    page: Annotated[
        Path | None, output_option(metavar="FILE", help="Write an HTML page with both scores and the changed answers.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train adapters again with the corrections in a log of answers.

    The old rows are learned too. Old and new adapters answer the old validation rows, and a quarter of the corrections,
    which are not learned. The new bundle is packed only if no adapter got worse on either by more than one standard
    error.
    """
    from edgetune_runtime.answer_log.log import file_before
    from edgetune_runtime.bundle import read_manifest

    from edgetune.common.files import write_file
    from edgetune.common.progress import Progress
    from edgetune.retraining.learning import questions as asking
    from edgetune.retraining.learning.learn import current_logs, read_logs
    from edgetune.retraining.learning.learn import learn as run
    from edgetune.retraining.learning.page import page_of

    if questions is not None and not ask:
        raise UsageError("--questions is given without --ask", "say how many with --ask N")
    if page is not None:
        check_page(page, bundle, into or bundle)
    if questions is not None:
        check_not_read(questions, [*log, *map(file_before, log)], bundle)
        # A user may have completed it.
        if questions.exists():
            raise UsageError(f"{questions} already exists", "give another file, or complete it and give it as --log")
    # Also with --quiet: what a user wrote would be lost in silence.
    entries, manifest = read_logs(bundle, log, Progress().say), read_manifest(bundle)
    chosen = asking.most_informative(entries, ask, manifest)
    if questions is not None:
        asking.write_questions(chosen, questions)
        if as_json:
            print_json({"questions": str(questions), "answers": len(chosen)})
        else:
            print(f"{questions}: {len(chosen)} answers; write the right one of each as its correction")
        return
    if chosen:
        print(asking.HELP, file=sys.stderr)
        answers = asking.ask(chosen, _reply_to, manifest)
        replies = {entry.id: entry for entry in asking.logged(answers, current_logs(log)[-1])}
        entries = [*(entry for entry in entries if entry.id not in replies), *replies.values()]
    result = run(bundle, entries, recipe, into, Progress(quiet=quiet))
    if page is not None:
        write_file(page, page_of(manifest.name, result), is_private=True)
    if as_json:
        print_json(result.to_json())
    else:
        _print(result)
    if result.worse:
        message = f"the new adapters are worse: {', '.join(result.worse)}"
        raise VerificationError(message, "look at the corrections; the bundle is as it was")


def _reply_to(question: str) -> str:
    """What the user types; standard output is for the result."""
    print(question, end="", file=sys.stderr, flush=True)
    return "" if sys.stdin is None else sys.stdin.readline()


def _print(result: Learned) -> None:
    """The scores before and after, some answers that changed, and how many corrections were learned."""
    print_changes(result.changes)
    learned = ", ".join(f"{count} corrections of {name}" for name, count in result.learned.items())
    print(f"learned {learned}; " + ("nothing packed" if result.bundle is None else f"packed {result.bundle}"))
