"""Writes the folder that a bundle is built from: training rows for a home and for invented homes, schema and recipe.

`python examples/home-assistant/generate.py --out build/home-rows`. The same arguments write the same files.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from assist.calls import open_schema
from generator import replies, rows
from generator.homes import load_home

HERE = Path(__file__).parent
SIZES = {
    "calls": {"train": 9000, "validation": 200, "test": 400},
    "reply": {"train": 2000, "validation": 80, "test": 100},
}


def main() -> None:
    """Write the rows of each adapter and split, the schema of the calls, and the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=HERE / "home.yaml", help="your home, or a list of Home Assistant")
    parser.add_argument("--share", type=float, default=0.3, help="share of the rows about it: 0 none, 1 all")
    about_rows = "training rows of the adapter calls; the other files have no more"
    parser.add_argument("--rows", type=int, default=SIZES["calls"]["train"], help=about_rows)
    parser.add_argument("--exclude", type=Path, help="JSONL with a `text` per line: sentences of a test, not to occur")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/home-rows"))
    given = parser.parse_args()
    if not 0 <= given.share <= 1:
        parser.error(f"--share {given.share} is not from 0 to 1")
    given.out.mkdir(parents=True, exist_ok=True)
    home = load_home(given.home)
    excluded = sentences_of(given.exclude) if given.exclude else frozenset()
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        training = split == "train"
        made = rows.rows(f"{given.seed} calls {split}", home, given.share, training=training, excluded=excluded)
        size = given.rows if training else min(SIZES["calls"][split], given.rows)
        write(given.out / f"calls-{split}.jsonl", made, size, seen)
        made = replies.rows(f"{given.seed} reply {split}", home, given.share, training=training)
        size = min(SIZES["reply"][split], given.rows)
        write(given.out / f"reply-{split}.jsonl", made, size, seen)
    (given.out / "calls-schema.json").write_text(json.dumps(open_schema()) + "\n", encoding="utf-8")
    shutil.copyfile(HERE / "recipe.yaml", given.out / "recipe.yaml")


def write(path: Path, made: Iterator[rows.Row], size: int, seen: set[str]) -> None:
    """Write so many rows whose prompts are not among `seen`, and add theirs to it."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in islice(_unseen(made, seen), size))
    print(f"{path}: {size} rows")


def _unseen(made: Iterator[rows.Row], seen: set[str]) -> Iterator[rows.Row]:
    for row in made:
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def sentences_of(path: Path) -> frozenset[str]:
    """The sentences of a test in the form that rows compare."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(rows.normal(json.loads(line)["text"]) for line in lines if line.strip())


if __name__ == "__main__":
    main()
