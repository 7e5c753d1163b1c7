"""Runs llama.cpp's converter, whose path and arguments follow, without code from the model's folder.

The converter asks transformers for such code, with trust_remote_code=True, wherever it reads a tokenizer.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer


def main() -> None:
    """Run the script in this process, as Python itself would."""
    for cls in (AutoConfig, AutoTokenizer):
        cls.from_pretrained = _without_code(cls.from_pretrained)
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _without_code(load: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - those of transformers
        return load(*arguments, **{**options, "trust_remote_code": False})

    return from_pretrained


if __name__ == "__main__":
    main()
