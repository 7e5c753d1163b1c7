"""Tiny real bases for all tests: Hugging Face folders and the GGUF files that llama.cpp's converter makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(arch)`: the Hugging Face folder of a tiny random base, arch in llama, qwen2, qwen3, gemma3."""
    from tiny import make_folder, make_tokenizer  # noqa: PLC0415 - torch only where a test needs a base

    root = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(root)
    return cache(lambda arch: make_folder(arch, root / arch, tokenizer))


@pytest.fixture(scope="session")
def tiny_gguf(tiny_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """`tiny_gguf(arch)`: the f16 GGUF of the same base."""
    from edgetune_export.convert import convert_folder  # noqa: PLC0415 - as above

    @cache
    def convert(arch: str) -> Path:
        folder = tiny_folder(arch)
        out = folder.with_suffix(".gguf")
        convert_folder(folder, out, dtype="f16")
        return out

    return convert
