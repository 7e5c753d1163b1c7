"""Edits of GGUF files: values of the metadata and their types, counts, lengths, and entries of the tensor table."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .json_file import NOT_FINITE, NUMBERS, WORDS
from .raw import Edit, byte_edit, with_bytes

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_OTHER_KEYS = {
    "split.count": 2,
    "split.no": 1,
    "general.alignment": 64,
    "tokenizer.ggml.precompiled_charsmap": [[0, [255, 255, 255]]],
    "{a}.expert_count": 8,
    "{a}.expert_used_count": 8,
    "{a}.vocab_size": 10**6,
    "{a}.attention.sliding_window": 1,
    "{a}.attention.key_length": 7,
    "{a}.attention.value_length": 0,
    "{a}.rope.dimension_count": 3,
    "{a}.rope.scaling.factor": float("nan"),
    "{a}.rope.scaling.type": "yarn",
    "{a}.attention.causal": False,
    "{a}.pooling_type": 9,
    "{a}.leading_dense_block_count": 1,
    "{a}.attention.clamp_kqv": float("inf"),
    "{a}.logit_scale": float("nan"),
    "{a}.rope.freq_base": 0.0,
    "{a}.attention.layer_norm_rms_epsilon": float("nan"),
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.seperator_token_id": 10**6,
    "tokenizer.ggml.eot_token_id": -1,
    "tokenizer.ggml.unknown_token_id": 2**31,
    "tokenizer.ggml.padding_token_id": 400,
    "tokenizer.ggml.mask_token_id": 1,
    "adapter.alora.invocation_tokens": [[4, [10**9]]],
    "general.quantization_version": 99,
    "general.file_type": 9999,
}
"""Keys that a file may have besides its own; an array is [[type, values]]."""
_NAMES = (
    "llama", "llama4", "qwen2", "qwen2moe", "qwen3", "gemma", "gemma2", "gemma3", "mamba", "rwkv6", "bert", "t5",
    "gpt2", "phi3", "deepseek2", "lfm2", "olmo2", "bpe", "spm", "wpm", "ugm", "none", "default", "linear", "yarn",
    "longrope", "llama-bpe", "lora", "adapter", "model", "control_vector", "f32",
)  # fmt: skip
_TEMPLATES = (
    "{{ 1//0 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a'*10**10 }}",
)


@dataclass
class Gguf:
    """A GGUF file in parts: `metadata` as [key, type, value] and `tensors` as [name, dimensions, type, offset]."""

    version: int
    metadata: list[list[Any]]
    tensors: list[list[Any]]
    data: bytes
    counts: list[int]
    alignment: int = 32


class GgufForm:
    """A GGUF file."""

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """One to three edits of the header, or in one of eight cases of bytes."""
        if rng.random() < 0.12:
            return [byte_edit(len(data), rng)]
        file = read(data)
        return [_edit(file, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The file with the edits; its counts fit unless an edit changes them."""
        file = read(data)
        extra = [0, 0]
        for kind, *rest in edits:
            if kind in _CHANGES:
                _CHANGES[kind](file, *rest)
            elif kind == "count":
                extra[rest[0]] = rest[1]
        file.counts = [len(file.tensors) + extra[0], len(file.metadata) + extra[1]]
        return with_bytes(written(file), edits)


def _edit(file: Gguf, rng: random.Random) -> Edit:
    what = rng.random()
    if what < 0.28:
        return _tensor_edit(file, rng)
    if what < 0.32:
        return ["count", rng.randrange(2), rng.choice((-1, 1, 1000, 2**32, 2**62))]
    architecture = next((str(value) for key, _, value in file.metadata if key == "general.architecture"), "llama")
    if what < 0.45:
        key, value = rng.choice([*_OTHER_KEYS.items()])
        return ["value", key.replace("{a}", architecture), *_typed(value)]
    return _metadata_edit(file, rng)


def _metadata_edit(file: Gguf, rng: random.Random) -> Edit:
    arrays = [item for item in file.metadata if item[1] == _ARRAY]
    key, kind, value = rng.choice(arrays if arrays and rng.random() < 0.35 else file.metadata)
    change = rng.choice(("value", "value", "value", "value", "type", "drop", "twice", "key"))
    if change in ("drop", "twice"):
        return [change, key]
    if change == "key":
        return ["key", key, rng.choice((*WORDS, *(other[0] for other in file.metadata)))]
    if change == "type":
        return ["type", key, rng.choice((*_CODES, 13, 2**31))]
    if kind == _ARRAY:
        return _array_edit(key, value, rng)
    return ["value", key, kind, _other(kind, value, rng)]


def _other(kind: int, value: Any, rng: random.Random) -> Any:  # noqa: ANN401 - a value of the metadata
    """Another value of the same type."""
    if kind == _STRING:
        return rng.choice((*WORDS, *_NAMES, *_TEMPLATES, str(value) * 2, str(value)[:-1]))
    if kind == _BOOL:
        return not value
    near = (value + 1, value - 1, value * 2, value * 1000, -value)
    return rng.choice((*NUMBERS, *near, *(NOT_FINITE * 3 if _CODES[kind] in "fd" else ())))


def _array_edit(key: str, value: Any, rng: random.Random) -> Edit:  # noqa: ANN401 - a value of the metadata
    item_type, items = value
    place = rng.randrange(max(len(items), 1))
    kind = rng.choice(("item", "item", "item", "copy", "length", "item_type", "item_count"))
    if kind == "length" or not items:
        return ["length", key, rng.choice((0, 1, len(items) - 1, len(items) + 1, 2 * len(items)))]
    if kind == "copy":
        return ["item", key, place, items[rng.randrange(len(items))]]
    if kind == "item_type":
        return ["item_type", key, rng.choice((*_CODES, _STRING, _ARRAY, 13))]
    if kind == "item_count":
        return ["item_count", key, rng.choice((0, len(items) - 1, len(items) + 1, 2**31, 2**61, 2**64 - 1))]
    return ["item", key, place, _other(item_type, items[place], rng)]


def _tensor_edit(file: Gguf, rng: random.Random) -> Edit:
    if not file.tensors:
        return ["count", 0, 1]
    name, dimensions, _, offset = rng.choice(file.tensors)
    change = rng.choice(("dimensions", "dimensions", "dimensions", "tensor_type", "offset", "name", "drop", "twice"))
    if change in ("drop", "twice"):
        return [f"{change}_tensor", name]
    if change == "name":
        return [
            "name",
            name,
            rng.choice((*WORDS, *(other[0] for other in file.tensors), "rope_freqs.weight", "output.weight")),
        ]
    if change == "tensor_type":
        return ["tensor_type", name, rng.choice((0, 1, 2, 3, 6, 7, 8, 10, 12, 16, 24, 26, 28, 30, 34, 39, 40, 2**31))]
    if change == "offset":
        return ["offset", name, rng.choice((0, 1, 32, offset + 32, offset - 32, 2**63, 2**64 - 32))]
    numbers = (0, 1, 2, 32, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
    changed = list(dimensions)
    how = rng.choice(("one", "one", "swap", "more", "fewer"))
    if how == "one":
        place = rng.randrange(len(changed))
        changed[place] = rng.choice(
            (*numbers, changed[place] + 1, changed[place] - 1, changed[place] * 2, changed[place] // 2)
        )
    elif how == "swap":
        changed.reverse()
    elif how == "more":
        changed.append(rng.choice((1, 2, 2**31)))
    else:
        changed.pop()
    return ["dimensions", name, changed]


def _typed(value: object) -> list[Any]:
    """Type and value of a new key."""
    if isinstance(value, bool):
        return [_BOOL, value]
    if isinstance(value, list):
        return [_ARRAY, *value]
    kinds = {str: _STRING, float: _FLOAT32, int: _UINT32}
    return [kinds[type(value)], value]


def _find(items: list[list[Any]], name: str) -> list[Any] | None:
    return next((item for item in items if item[0] == name), None)


def _value(file: Gguf, key: str, kind: int, value: object) -> None:
    found = _find(file.metadata, key)
    if found is None:
        file.metadata.append([key, kind, value])
    else:
        found[1:] = [kind, value]


def _set(items: str, place: int, file: Gguf, name: str, value: object) -> None:
    found = _find(getattr(file, items), name)
    if found is not None:
        found[place] = value


def _drop(items: str, file: Gguf, name: str) -> None:
    found = _find(getattr(file, items), name)
    if found is not None:
        getattr(file, items).remove(found)


def _twice(items: str, file: Gguf, name: str) -> None:
    found = _find(getattr(file, items), name)
    if found is not None:
        getattr(file, items).append(list(found))


def _array(change: str, file: Gguf, key: str, *arguments: Any) -> None:  # noqa: ANN401 - as the change has them
    found = _find(file.metadata, key)
    if found is None or found[1] != _ARRAY:
        return
    kind, items, *count = found[2]
    if change == "item" and arguments[0] < len(items):
        items = [*items[: arguments[0]], arguments[1], *items[arguments[0] + 1 :]]
    elif change == "length":
        items = (items * 2)[: arguments[0]]
    elif change == "item_type":
        kind = arguments[0]
    elif change == "item_count":
        count = [arguments[0]]
    found[2] = [kind, items, *count]


_CHANGES = {
    "value": _value,
    "type": lambda *given: _set("metadata", 1, *given),
    "key": lambda *given: _set("metadata", 0, *given),
    "drop": lambda *given: _drop("metadata", *given),
    "twice": lambda *given: _twice("metadata", *given),
    "name": lambda *given: _set("tensors", 0, *given),
    "dimensions": lambda *given: _set("tensors", 1, *given),
    "tensor_type": lambda *given: _set("tensors", 2, *given),
    "offset": lambda *given: _set("tensors", 3, *given),
    "drop_tensor": lambda *given: _drop("tensors", *given),
    "twice_tensor": lambda *given: _twice("tensors", *given),
    **{
        name: (lambda *given, name=name: _array(name, *given)) for name in ("item", "length", "item_type", "item_count")
    },
}


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def number(self, code: str) -> Any:  # noqa: ANN401 - a number of that type
        size = struct.calcsize(f"<{code}")
        self.place += size
        return struct.unpack(f"<{code}", self.data[self.place - size : self.place])[0]

    def string(self) -> str:
        size = self.number("Q")
        self.place += size
        return self.data[self.place - size : self.place].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:  # noqa: ANN401 - a value of the metadata
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            return [item, [self.value(item) for _ in range(count)]]
        return self.number(_CODES[kind])


def read(data: bytes) -> Gguf:
    """The parts of a valid file; what is in them may be replaced, but not changed."""
    file = _read(data)
    metadata, tensors = ([list(item) for item in items] for items in (file.metadata, file.tensors))
    return replace(file, metadata=metadata, tensors=tensors, counts=list(file.counts))


@lru_cache(2)
def _read(data: bytes) -> Gguf:
    reader = _Reader(data)
    reader.place = 4
    version, tensors, keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    metadata = []
    for _ in range(keys):
        key, kind = reader.string(), reader.number("I")
        metadata.append([key, kind, reader.value(kind)])
    table = []
    for _ in range(tensors):
        name = reader.string()
        dimensions = [reader.number("Q") for _ in range(reader.number("I"))]
        table.append([name, dimensions, reader.number("I"), reader.number("Q")])
    start = reader.place + -reader.place % 32
    return Gguf(version, metadata, table, data[start:], [tensors, keys])


def written(file: Gguf) -> bytes:
    """The bytes of a file; numbers that do not fit their type are cut."""
    out = [b"GGUF", _number("I", file.version), *(_number("Q", count) for count in file.counts)]
    for key, kind, value in file.metadata:
        out += [_string(key), _number("I", kind), _written(kind, value)]
    for name, dimensions, kind, offset in file.tensors:
        out += [_string(name), _number("I", len(dimensions)), *(_number("Q", size) for size in dimensions)]
        out += [_number("I", kind), _number("Q", offset)]
    head = b"".join(out)
    return head + bytes(-len(head) % file.alignment) + file.data


def _written(kind: int, value: Any) -> bytes:  # noqa: ANN401 - a value of the metadata
    if isinstance(value, list):
        item, items, *count = value
        data = b"".join(_written(item, one) for one in items)
        return _number("I", item) + _number("Q", count[0] if count else len(items)) + data
    if isinstance(value, str):
        return _string(value)
    return _number(_CODES.get(kind, "I"), value)


def _number(code: str, value: Any) -> bytes:  # noqa: ANN401 - a number, or what stands in its place
    if code in "fd":
        try:
            return struct.pack(f"<{code}", float(value))
        except OverflowError:
            return struct.pack(f"<{code}", float("inf"))
    number = int(value) if math.isfinite(value) else 0
    size = struct.calcsize(code)
    return (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape")
    return len(data).to_bytes(8, "little") + data
