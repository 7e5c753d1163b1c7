"""The tokenizer of an ONNX bundle: a `tokenizer.json`, read by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import VerificationError, importing, parsing
from edgetune_runtime.formats.regular_file import reading
from edgetune_runtime.formats.tokenizer_json import TOKENIZER_NAME, check_tokenizer
from edgetune_runtime.text.controls import ControlTokens
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN, ONNX_NEEDS, shortened

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""SentencePiece's character for a space."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = frozenset([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_SHORT = 10_000


class JsonTokenizer(Tokenizer):
    """The tokenizer in a folder written by `edgetune_export.backends.onnx.tokenizer`; see `Tokenizer`.

    `end_tokens` end a generation; the first one is the end-of-turn token. NotFoundError when a file is missing,
    VerificationError when one is damaged, IncompatibleError when the `tokenizers` library is not installed.
    """

    def __init__(self, folder: Path, end_tokens: Sequence[int]) -> None:
        self._tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
        config = _config(folder / "tokenizer_config.json")
        self.vocab_size = self._tokenizer.get_vocab_size()
        for token in end_tokens:
            if not 0 <= token < self.vocab_size:
                message = f"end token {token} is not in the vocabulary of {self.vocab_size} in {folder}"
                raise VerificationError(message, COPY_BUNDLE_AGAIN)
        self._ends = frozenset(end_tokens)
        self._end_token = end_tokens[0] if end_tokens else -1
        self.bos: str = config["bos_token"] or ""
        self.eos: str = config["eos_token"] or ""
        self.chat_template: str | None = config.get("chat_template")
        bos = self._tokenizer.token_to_id(self.bos)
        self._added_bos = [bos] if config["add_bos_token"] and bos is not None else []
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: b"" if entry.special else entry.content.encode() for token, entry in added.items()}
        self._added |= dict.fromkeys(config["unused_tokens"], b"")
        self._controls = ControlTokens(entry.content for entry in added.values() if entry.special)
        self._sentencepiece = bool(getattr(self._tokenizer.model, "byte_fallback", False))
        self._newline = self._tokenizer.token_to_id("<0x0A>")
        self._adds_space = self._sentencepiece and any(
            self.piece(token).startswith(b" ") for token in self._raw("a")[:1]
        )

    @property
    def controls(self) -> ControlTokens:
        """The control tokens."""
        return self._controls

    @property
    def end_token(self) -> int:
        """The end-of-turn token, or the end-of-text token if there is none; -1 if there is neither."""
        return self._end_token

    def piece(self, token: int) -> bytes:
        """The bytes of `token`; empty for control tokens."""
        self._check(token)
        added = self._added.get(token)
        if added is not None:
            return added
        return self._decoded(self._tokenizer.id_to_token(token) or "")

    def pieces(self) -> list[bytes]:
        """The bytes of every token, as `piece` gives them."""
        self._check()
        pieces = [b""] * self.vocab_size
        for text, token in self._tokenizer.get_vocab(with_added_tokens=False).items():
            pieces[token] = self._decoded(text)
        for token, data in self._added.items():
            pieces[token] = data
        return pieces

    def is_end(self, token: int) -> bool:
        """Whether generation ends with `token`."""
        self._check(token)
        return token in self._ends

    def ends(self) -> list[int]:
        """All tokens that generation ends with, in order."""
        self._check()
        return sorted(self._ends)

    def _decoded(self, text: str) -> bytes:
        """The bytes of a token, from its text in the vocabulary."""
        return _sentencepiece_bytes(text) if self._sentencepiece else _byte_level_bytes(text)

    def _raw(self, text: str) -> list[int]:
        self._check()
        return encode(self._tokenizer, text, adds_special_tokens=False)


def encode(tokenizer: tokenizers.Tokenizer, text: str, *, adds_special_tokens: bool) -> list[int]:
    """Token ids of a text. Other threads run meanwhile."""
    valid = text.encode("utf-8", "replace").decode()
    with panics_as_errors("the tokenizer of the base fails"):
        if len(valid) <= _SHORT:
            encoding = tokenizer.encode(valid, add_special_tokens=adds_special_tokens)
        else:
            # `encode` holds the GIL, which takes seconds for 1 MB.
            (encoding,) = tokenizer.encode_batch([valid], add_special_tokens=adds_special_tokens)
    tokens: list[int] = encoding.ids
    return tokens


def byte_character(byte: int) -> str:
    """GPT-2's character for a byte: printable Latin-1 characters stay, the others become U+0100 and up."""
    return chr(byte) if byte in _PRINTABLE else chr(0x100 + _OTHERS.index(byte))


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Load a `tokenizer.json` so that it neither pads nor truncates; same errors as `JsonTokenizer`."""
    with importing(*ONNX_NEEDS):
        import tokenizers  # noqa: PLC0415 - optional
    text = _read(path)
    check_tokenizer(text, path)
    with panics_as_errors(f"{path} is not a tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        # Many such files of encoders do so by default.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


@contextmanager
def panics_as_errors(problem: str) -> Iterator[None]:
    """Turn all that the library raises into a VerificationError: Exceptions, and panics, which are not Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise VerificationError(f"{problem}: {shortened(str(error))}", COPY_BUNDLE_AGAIN) from error


def _config(path: Path) -> dict[str, Any]:
    with parsing(f"{path} is not JSON", COPY_BUNDLE_AGAIN):
        config = json.loads(_read(path))
    text = str | None
    expected: dict[str, Any] = {"bos_token": text, "eos_token": text, "add_bos_token": bool, "unused_tokens": list}
    values = config if isinstance(config, dict) else {}
    wrong = [key for key, kind in expected.items() if key not in values or not isinstance(values[key], kind)]
    if "unused_tokens" not in wrong and not all(isinstance(token, int) for token in values["unused_tokens"]):
        wrong.append("unused_tokens")
    if not isinstance(values.get("chat_template"), text):
        wrong.append("chat_template")
    if wrong:
        raise VerificationError(f"{path} has no valid {', '.join(wrong)}", COPY_BUNDLE_AGAIN)
    return values


def _read(path: Path) -> str:
    with reading(path) as file, parsing(f"cannot read {path}", COPY_BUNDLE_AGAIN):
        return file.read().decode()


def _sentencepiece_bytes(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    return bytes.fromhex(byte[1]) if byte else text.replace(SPACE, " ").encode()


def _byte_level_bytes(text: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(map(table.__getitem__, text))
    except KeyError:
        # llama.cpp's output for a character that encodes no byte.
        unknown = (f"[UNK_BYTE_0x{character.encode().hex()}{text}]".encode() for character in text)
        return b"".join(
            bytes([table[one]]) if one in table else other for one, other in zip(text, unknown, strict=True)
        )


@cache
def _byte_of_character() -> dict[str, int]:
    return {byte_character(byte): byte for byte in range(256)}
