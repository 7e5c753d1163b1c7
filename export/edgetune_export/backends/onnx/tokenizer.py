"""Writes a GGUF base's tokenizer as `tokenizer.json` with its config, for runtimes without llama.cpp.

The tokens' text, type and score come from llama.cpp itself, which corrects metadata of some files. Texts get the same
token ids as in llama.cpp with these exceptions, of which a build warns if a task's texts have any:
- Code points new in Unicode 16: the tables of Oniguruma (in tokenizers) have them, those of llama.cpp do not.
- Overlapping special tokens in a text: here the first one matches, in llama.cpp the longest one.
- Special tokens that strip the white space after them (Phi-3): Unicode white space here, ASCII in llama.cpp.
- SentencePiece merges where pairs overlap: llama.cpp merges the pair on the left first, here the order depends on
  where the merged token is split.
- SentencePiece characters that are not a token but part of one: llama.cpp merges them, here they become bytes.
- Byte-level merges whose result is not a token, and bytes above 0x7F without a token.
- Runs of line breaks that are a token which no merges make (Gemma 4): llama.cpp uses it whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.engines.gguf.llama import Vocabulary, library
from edgetune_runtime.engines.onnx.tokenizers import SPACE, byte_character
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from edgetune_runtime.formats.tokenizer_json import DEFAULT, DIGIT, GPT2, LINES, LLAMA3, QWEN2, TOKENIZER_NAME
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_REMEDY = "build for gguf, or choose another base"
_GEMMA4 = "gemma4"
"""SentencePiece with merges of its own, within a line."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 4, 1 << 7, 1 << 8
_SPECIAL = _UNKNOWN | _CONTROL

_SPLITS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "exaone4"): (GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): (DIGIT, GPT2),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): (LLAMA3,),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): (LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "kormo", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"): (QWEN2,),
    ("default", ""): DEFAULT,
}
"""llama.cpp's regular expressions, applied in order, by values of `tokenizer.ggml.pre` (llama-vocab.cpp)."""

_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4"}
"""Pre-tokenizers with which a word that is a token is used whole, ignoring the merges."""


@dataclass(frozen=True)
class _Token:
    text: str
    attributes: int
    score: float


def write_tokenizer(base: Path, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if the base has one, `chat_template.jinja` to `folder`.

    IncompatibleError for a vocabulary type or a pre-tokenizer without an equivalent in the `tokenizers` library.
    """
    header = read_header(base)
    _check_kind(header)
    with closing(GgufTokenizer(base)) as vocabulary:
        tokens = _tokens(vocabulary)
        adds_bos = bool(library().llama_vocab_get_add_bos(vocabulary.pointer)) and vocabulary.bos != ""
        tokenizer = _byte_level(header, tokens) if _kind(header) == "gpt2" else _sentencepiece(header, tokens)
        _add_specials(tokenizer, tokens)
        if adds_bos:
            _add_bos(tokenizer, vocabulary.bos, library().llama_vocab_bos(vocabulary.pointer))
        config = _config(vocabulary, tokens, adds_bos=adds_bos)
        template = vocabulary.chat_template
    tokenizer.save(str(folder / TOKENIZER_NAME), pretty=False)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def end_tokens(base: Path) -> list[int]:
    """All tokens at which llama.cpp ends a generation, the end-of-turn token first."""
    with closing(GgufTokenizer(base)) as tokenizer:
        return sorted(tokenizer.ends(), key=lambda token: token != tokenizer.end_token)


def _config(vocabulary: Vocabulary, tokens: Sequence[_Token], *, adds_bos: bool) -> dict[str, Any]:
    # Filler tokens: llama.cpp prints them as nothing although they are not special.
    unused = [n for n, token in enumerate(tokens) if not token.attributes & _SPECIAL and not vocabulary.piece(n)]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.bos or None,
        "eos_token": vocabulary.eos or None,
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "unused_tokens": unused,
    }
    return config if vocabulary.chat_template is None else config | {"chat_template": vocabulary.chat_template}


def _kind(header: GgufHeader) -> str:
    return str(header.metadata.get("tokenizer.ggml.model", ""))


def _check_kind(header: GgufHeader) -> None:
    kind = _kind(header)
    if kind not in {"gpt2", "llama", _GEMMA4}:
        raise IncompatibleError(f"ONNX bundles do not support tokenizers of model {kind!r}", _REMEDY)
    if kind == "gpt2":
        _splits(header)


def _splits(header: GgufHeader) -> tuple[str, ...]:
    pre = header.metadata.get("tokenizer.ggml.pre", "")
    patterns = next((splits for names, splits in _SPLITS.items() if pre in names), None)
    if patterns is None:
        raise IncompatibleError(f"ONNX bundles do not support the pre-tokenizer {pre!r}", _REMEDY)
    return patterns


def _tokens(vocabulary: Vocabulary) -> list[_Token]:
    llama, pointer = library(), vocabulary.pointer
    tokens = []
    for token in range(vocabulary.vocab_size):
        try:
            text = llama.llama_vocab_get_text(pointer, token).decode()
        except UnicodeDecodeError as error:
            message = f"ONNX bundles do not support token {token}, whose text is not UTF-8"
            raise IncompatibleError(message, _REMEDY) from error
        attributes = int(llama.llama_vocab_get_attr(pointer, token))
        tokens.append(_Token(text, attributes, float(llama.llama_vocab_get_score(pointer, token))))
    return tokens


def _byte_level(header: GgufHeader, tokens: Sequence[_Token]) -> Tokenizer:
    vocabulary = _ids(tokens)
    merges = _stored_merges(header, vocabulary)
    whole_words = header.metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    splits: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _splits(header)
    ]
    # A byte without a token is dropped, but its neighbours must not be merged.
    missing = "".join(chr(byte) for byte in range(0x80) if byte_character(byte) not in vocabulary)
    if missing:
        splits.append(pre_tokenizers.Split(Regex(f"[{re.escape(missing)}]"), behavior="isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: GgufHeader, tokens: Sequence[_Token]) -> Tokenizer:
    vocabulary, has_merges = _ids(tokens), _kind(header) == _GEMMA4
    adds_space = not has_merges and bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    merges = _stored_merges(header, vocabulary) if has_merges else _merges(tokens, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    if has_merges:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(LINES), behavior="isolated")
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if adds_space else escape
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return tokenizer


def _stored_merges(header: GgufHeader, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges in the file whose parts and result are tokens."""
    merges: dict[tuple[str, str], None] = {}
    for merge in header.metadata.get("tokenizer.ggml.merges", ()):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut > 0 and {left, right, left + right} <= vocabulary.keys():
            merges[left, right] = None
    return list(merges)


def _merges(tokens: Sequence[_Token], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that form a token, in llama.cpp's merge order: highest score first."""
    best_first = sorted(range(len(tokens)), key=lambda token: -tokens[token].score)
    pairs = []
    for token in best_first:
        text = tokens[token].text
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((left, right))
    return pairs


def _ids(tokens: Sequence[_Token]) -> dict[str, int]:
    return {token.text: number for number, token in enumerate(tokens)}


def _add_specials(tokenizer: Tokenizer, tokens: Sequence[_Token]) -> None:
    """Add the tokens that llama.cpp matches before all others: control, unknown and user-defined ones."""
    for is_special, add in ((True, tokenizer.add_special_tokens), (False, tokenizer.add_tokens)):
        added = [
            AddedToken(
                token.text,
                normalized=False,
                special=is_special,
                lstrip=bool(token.attributes & _LSTRIP),
                rstrip=bool(token.attributes & _RSTRIP),
            )
            for token in tokens
            if token.attributes & (_SPECIAL | _USER_DEFINED) and bool(token.attributes & _SPECIAL) == is_special
        ]
        add(added)


def _add_bos(tokenizer: Tokenizer, text: str, token: int) -> None:
    """Make other runtimes prepend BOS, which they do only if the file says so."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[text, "$A"], pair=[text, "$A", "$B:1"], special_tokens=[(text, token)]
    )
