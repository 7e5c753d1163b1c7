"""The list of what a `tokenizer.json` may contain: types of nodes with their fields, and regular expressions.

The `tokenizers` library panics at some values, and takes hours for some regular expressions. The list has what
edgetune's exporter writes for decoders, and what comes with the encoders that it supports.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import VerificationError, parsing
from edgetune_runtime.wording import first_of

TOKENIZER_NAME = "tokenizer.json"

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
DIGIT = r"\p{N}"
LINES = r"[^\n]+|[\n]+"
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
"""The regular expressions of llama.cpp's tokenizers with merges (llama-vocab.cpp)."""

_REGEXES = frozenset((GPT2, LLAMA3, QWEN2, DIGIT, LINES, *DEFAULT, " {2,}"))
_CHARACTERS = re.compile(r"\[(\\?[\x00-\x7f])+\]")
"""A set of characters, which the exporter writes for bytes without a token."""
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "normalizer": {
        "Sequence": "normalizers",
        "BertNormalizer": "clean_text handle_chinese_chars strip_accents lowercase",
        "Lowercase": "",
        "NFC": "",
        "NFD": "",
        "NFKC": "",
        "NFKD": "",
        "StripAccents": "",
        "Strip": "strip_left strip_right",
        "Prepend": "prepend",
        "Replace": "pattern content",
        "Precompiled": "precompiled_charsmap",
    },
    "pre_tokenizer": {
        "Sequence": "pretokenizers",
        "BertPreTokenizer": "",
        "ByteLevel": "add_prefix_space trim_offsets use_regex",
        "Split": "pattern behavior invert",
        "Metaspace": "replacement prepend_scheme split",
        "Whitespace": "",
        "WhitespaceSplit": "",
    },
    "post_processor": {
        "Sequence": "processors",
        "TemplateProcessing": "single pair special_tokens",
        "BertProcessing": "sep cls",
        "RobertaProcessing": "sep cls trim_offsets add_prefix_space",
        "ByteLevel": "add_prefix_space trim_offsets use_regex",
    },
    "decoder": {
        "Sequence": "decoders",
        "ByteLevel": "add_prefix_space trim_offsets use_regex",
        "ByteFallback": "",
        "Fuse": "",
        "Replace": "pattern content",
        "Strip": "content start stop",
        "WordPiece": "prefix cleanup",
        "Metaspace": "replacement prepend_scheme split",
    },
    "model": {
        "BPE": "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges"
        " vocab merges",
        "WordPiece": "unk_token continuing_subword_prefix max_input_chars_per_word vocab",
        "Unigram": "unk_id vocab byte_fallback",
    },
}
_KEYS = frozenset(("version", "truncation", "padding", "added_tokens", "model", *_SECTIONS))


def check_tokenizer(text: str, path: Path) -> None:
    """VerificationError, with up to three problems, for a `tokenizer.json` with anything that is not in the list."""
    remedy = "build or copy the bundle again, or choose another base"
    with parsing(f"{path} is not JSON", remedy):
        values = json.loads(text, object_pairs_hook=_unique)
    problems = list(_wrong(values)) if isinstance(values, dict) else ["it is not an object"]
    if problems:
        raise VerificationError(f"{path} is not a tokenizer that is known here: {first_of(problems)}", remedy)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; ValueError for a key that it has twice, of which another reader may take the other one."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it has a key twice")
    return values


def _wrong(values: Mapping[str, Any]) -> Iterator[str]:
    if unknown := sorted(values.keys() - _KEYS):
        yield f"it has {unknown[0][:80]!r}"
    for section in (*_SECTIONS, "model"):
        if values.get(section) is not None or section == "model":
            yield from _wrong_node(section, values.get(section), 0)


def _wrong_node(section: str, node: object, depth: int) -> Iterator[str]:
    if not isinstance(node, dict):
        yield f"a {section} is not an object"
        return
    # Files of older libraries leave out the type of a model with merges.
    kind = node.get("type", "BPE" if section == "model" and "merges" in node else None)
    fields = _FIELDS[section].get(kind) if isinstance(kind, str) else None
    if fields is None:
        yield f"it has the {section} {str(kind)[:80]!r}"
    elif unknown := sorted(node.keys() - {"type", *fields.split()}):
        yield f"its {section} {kind} has {unknown[0][:80]!r}"
    elif kind == "Sequence":
        parts = node.get(fields)
        # tokenizers writes no sequence within another.
        if depth or not isinstance(parts, list):
            yield f"its {section} is a sequence within another, or without parts"
            return
        for part in parts:
            yield from _wrong_node(section, part, depth + 1)
    elif "pattern" in node:
        yield from _wrong_pattern(section, node["pattern"])


def _wrong_pattern(section: str, pattern: object) -> Iterator[str]:
    match pattern:
        case {"String": str()}:
            return
        case {"Regex": str(regex)} if regex in _REGEXES or _CHARACTERS.fullmatch(regex):
            return
    yield f"its {section} has the pattern {str(pattern)[:80]!r}"
