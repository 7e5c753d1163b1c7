"""Answers assist tasks with a bundle and writes the predicted calls, one JSON object per task.

`python examples/home-assistant/score.py BUNDLE TASKS.jsonl --out FILE`. A task has `task_id`, `system` (the
prompt of Home Assistant), `tools`, `text` (what is said), and may have `accepted`: lists of right calls.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from assist.prompt import Reply, rewrite
from edgetune_runtime import EdgetuneError, Runtime

MAX_TOKENS = 200
Task = Mapping[str, Any]


def main() -> int:
    """Write the predictions, and report the seconds per answer and, where tasks have `accepted`, how many are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--out", type=Path, default=Path("predictions.jsonl"))
    parser.add_argument("--adapter", default="calls")
    given = parser.parse_args()
    tasks = [json.loads(line) for line in given.tasks.read_text(encoding="utf-8").splitlines() if line.strip()]
    right = 0
    seconds: list[float] = []
    answers: dict[str, str] = {}
    try:
        with Runtime.open(given.bundle) as runtime, given.out.open("w", encoding="utf-8") as out:
            for task in tasks:
                reply = answer(runtime, given.adapter, task, answers, seconds)
                record = {"task_id": task["task_id"], "calls": list(reply.calls), "text": reply.text}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                right += is_accepted(reply.calls, task.get("accepted", ()))
    except EdgetuneError as error:
        print(f"score.py: {error}", file=sys.stderr)
        return error.exit_code
    mean = sum(seconds) / max(1, len(seconds))
    print(f"{given.out}: {len(tasks)} tasks, {len(seconds)} different prompts, {mean:.2f} s each")
    if any(task.get("accepted") for task in tasks):
        print(f"{right} of {len(tasks)} have the same calls as an accepted answer, key by key")
    return 0


def answer(runtime: Runtime, adapter: str, task: Task, answers: dict[str, str], seconds: list[float]) -> Reply:
    """The reply to a task; the model answers once per prompt and schema."""
    messages = [{"role": "system", "content": task["system"]}, {"role": "user", "content": task["text"]}]
    request = rewrite(messages, task["tools"])
    key = json.dumps([request.prompt, request.schema])
    if key not in answers:
        start = time.perf_counter()
        made = runtime.generate(request.prompt, adapter=adapter, schema=request.schema, max_tokens=MAX_TOKENS)
        seconds.append(time.perf_counter() - start)
        answers[key] = made.text
    return request.reply(answers[key])


def is_accepted(calls: Iterable[Mapping[str, Any]], accepted: Iterable[Iterable[Mapping[str, Any]]]) -> bool:
    """Whether the calls are those of an accepted answer; order, letter case and empty arguments do not count."""
    return _form(calls) in [_form(other) for other in accepted]


def _form(calls: Iterable[Mapping[str, Any]]) -> list[str]:
    plain = ({key: value for key, value in call["arguments"].items() if value not in (None, "", [])} for call in calls)
    return sorted(
        json.dumps([call["name"], rest], sort_keys=True).lower() for call, rest in zip(calls, plain, strict=False)
    )


if __name__ == "__main__":
    sys.exit(main())
