"""Tokenizers of both engines, of a tiny SentencePiece base and of a byte-level one as large as a real base has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path

import pytest
from edgetune_export.backends.onnx.tokenizer import end_tokens, write_tokenizer
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.engines.onnx.tokenizers import JsonTokenizer

from edgetune.bases import locate

BASES = [(engine, base) for base in ("tiny", "smollm2") for engine in ("gguf", "onnx")]
Opened = tuple[Tokenizer, Grammars]


@pytest.fixture(scope="session")
def opened(
    tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Opened]]:
    """`opened(engine, base)`: its tokenizer, and the forms of answers on it."""
    with ExitStack() as stack:

        @cache
        def open_(engine: str, base: str) -> Opened:
            folder = tmp_path_factory.mktemp(base)
            path = tiny_gguf("llama") if base == "tiny" else locate("smollm2-135m", folder)
            if engine == "gguf":
                tokenizer: Tokenizer = stack.enter_context(closing(GgufTokenizer(path)))
            else:
                write_tokenizer(path, folder)
                tokenizer = JsonTokenizer(folder, end_tokens(path))
            return tokenizer, Grammars(tokenizer)

        yield open_


@pytest.fixture(params=BASES, ids="-".join)
def base(request: pytest.FixtureRequest, opened: Callable[..., Opened]) -> Opened:
    """Tokenizer and forms of each base in each engine."""
    return opened(*request.param)


@pytest.fixture
def tiny(opened: Callable[..., Opened]) -> Opened:
    """Those of the tiny base, in llama.cpp."""
    return opened("gguf", "tiny")
