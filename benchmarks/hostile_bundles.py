"""Changed copies of a bundle: each change makes the digests fit, so that what reads the file gets to see it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from edgetune_runtime.bundle import MANIFEST_NAME
from fuzz.forms.gguf_file import GgufForm, read, written

from benchmarks.hostile_files import STATES, FileAttack

_UINT16, _UINT32, _INT32, _FLOAT32, _STRING = 2, 4, 5, 6, 8
"""Types of values in GGUF."""
Bundle = Path
Manifest = dict[str, Any]


def _manifest(bundle: Bundle) -> Manifest:
    values: Manifest = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
    return values


def _write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _save(bundle: Bundle, manifest: Manifest) -> None:
    _write(bundle / MANIFEST_NAME, json.dumps(manifest).encode("utf-8", "surrogatepass"))


def _put(bundle: Bundle, file: str, data: bytes) -> None:
    """Change a file of the bundle, and make its digest fit; adapters are of another base than a changed one."""
    _write(bundle / file, data)
    manifest = _manifest(bundle)
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"][file] = {"sha256": digest, "bytes": len(data)}
    if file == manifest["base"]["files"].get("gguf"):
        manifest["base"]["fingerprint"] = digest
        manifest["adapters"] = {}
    _save(bundle, manifest)


def _base(bundle: Bundle) -> tuple[str, bytes]:
    file = _manifest(bundle)["base"]["files"]["gguf"]
    return file, (bundle / file).read_bytes()


def _metadata(key: str, kind: int, value: object) -> Callable[[Bundle], None]:
    """Sets a value in the base; {a} in its key stands for the architecture."""

    def change(bundle: Bundle) -> None:
        file, data = _base(bundle)
        architecture = next(value for key, _, value in read(data).metadata if key == "general.architecture")
        edit = ["value", key.replace("{a}", architecture), kind, value]
        _put(bundle, file, GgufForm().applied(data, [edit]))

    return change


def _split(bundle: Bundle) -> None:
    """The base in two files, of which the manifest lists the first, which has one tensor."""
    file, data = _base(bundle)
    whole = read(data)
    numbers = [["split.count", _UINT16, 2], ["split.tensors.count", _INT32, len(whole.tensors)]]
    end = whole.tensors[1][3]
    others = [[*tensor[:3], tensor[3] - end] for tensor in whole.tensors[1:]]
    metadata = [*whole.metadata, ["split.no", _UINT16, 0], *numbers]
    parts = (
        replace(whole, metadata=metadata, tensors=whole.tensors[:1], data=whole.data[:end]),
        replace(whole, metadata=[["split.no", _UINT16, 1], *numbers], tensors=others, data=whole.data[end:]),
    )
    first, second = ((Path(file).parent / f"model-0000{number}-of-00002.gguf").as_posix() for number in (1, 2))
    manifest = _manifest(bundle)
    manifest["base"]["files"]["gguf"] = first
    del manifest["files"][file]
    _save(bundle, manifest)
    for path, part in zip((first, second), parts, strict=True):
        _write(bundle / path, written(replace(part, counts=[len(part.tensors), len(part.metadata)])))
    _put(bundle, first, (bundle / first).read_bytes())


def _token_twice(bundle: Bundle) -> None:
    file, data = _base(bundle)
    tokens = next(value for key, _, value in read(data).metadata if key == "tokenizer.ggml.tokens")[1]
    _put(bundle, file, GgufForm().applied(data, [["item", "tokenizer.ggml.tokens", 300, tokens[301]]]))


def _other_tokenizer(bundle: Bundle) -> None:
    file, data = _base(bundle)
    model = next(value for key, _, value in read(data).metadata if key == "tokenizer.ggml.model")
    other = "gpt2" if model == "llama" else "llama"
    _put(bundle, file, GgufForm().applied(data, [["value", "tokenizer.ggml.model", _STRING, other]]))


def _template(text: str) -> Callable[[Bundle], None]:
    return _metadata("tokenizer.chat_template", _STRING, text)


def _change_manifest(change: Callable[[Manifest], object]) -> Callable[[Bundle], None]:
    def run(bundle: Bundle) -> None:
        manifest = _manifest(bundle)
        change(manifest)
        _save(bundle, manifest)

    return run


def _adapter(edits: Sequence[list[Any]]) -> Callable[[Bundle], None]:
    """Edits the first adapter that is a LoRA."""

    def change(bundle: Bundle) -> None:
        entries = _manifest(bundle)["adapters"].values()
        file = next(entry["files"]["gguf"] for entry in entries if entry["shapes"].get("gguf") == "low_rank")
        _put(bundle, file, GgufForm().applied((bundle / file).read_bytes(), edits))

    return change


def _tokenizer_json(change: Callable[[Any], object]) -> Callable[[Bundle], None]:
    def run(bundle: Bundle) -> None:
        file = (Path(_manifest(bundle)["base"]["files"]["onnx"]).parent / "tokenizer.json").as_posix()
        values = json.loads((bundle / file).read_text(encoding="utf-8"))
        change(values)
        _put(bundle, file, json.dumps(values).encode())

    return run


def _graph(change: Callable[[Any], object]) -> Callable[[Bundle], None]:
    def run(bundle: Bundle) -> None:
        file = _manifest(bundle)["base"]["files"]["onnx"]
        model = onnx.load(bundle / file, load_external_data=False)
        change(model.graph)
        _put(bundle, file, model.SerializeToString())

    return run


def _large_constant(graph: Any) -> None:  # noqa: ANN401 - a message of onnx
    """A node that makes 10^12 numbers from a shape."""
    shape = onnx.helper.make_tensor("hostile_shape", onnx.TensorProto.INT64, [2], [10**6, 10**6])
    graph.initializer.append(shape)
    graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", ["hostile_shape"], ["hostile"]))


def _special(make: Callable[[Path], object]) -> Callable[[Bundle], None]:
    """In place of the base, something that is not a regular file."""

    def change(bundle: Bundle) -> None:
        path = bundle / _manifest(bundle)["base"]["files"]["gguf"]
        path.unlink()
        make(path)

    return change


def _states(change: Callable[[Path], object]) -> Callable[[Bundle], None]:
    """Gives the adapters prompts that are long enough for a state, saves their states, and changes each file."""

    def run(bundle: Bundle) -> None:
        manifest = _manifest(bundle)
        for number, adapter in enumerate(manifest["adapters"].values()):
            adapter["system"] = f"{number} " + "answer in one word and play " * 20
        _save(bundle, manifest)
        states = bundle.parent / STATES
        command = [sys.executable, "-m", "edgetune_runtime", "warm", str(bundle), "--cache-folder", str(states)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        saved = [*states.glob("*.kv")]
        if not saved:
            raise RuntimeError(f"no state of {bundle} was saved")
        for path in saved:
            change(path)

    return run


def _head(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the line of JSON at the start of a state's file."""

    def run(path: Path) -> None:
        line, rest = path.read_bytes().split(b"\n", 1)
        head = json.loads(line)
        change(head)
        _write(path, json.dumps(head).encode() + b"\n" + rest)

    return run


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _state(name: str, does: str, change: Callable[[Path], object]) -> FileAttack:
    words = ("generate", "BUNDLE", "--adapter", "ADAPTER", "--prompt", "hi", "--max-tokens", "4")
    return FileAttack(name, "13", does, _states(change), words, must="open")


_NESTED_LOOPS = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
_RECURSION = "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"
_NORMALIZER = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
_DEEP = "[" * 50_000 + "]" * 50_000
_LORA = "adapter.lora.alpha"
ATTACKS: Sequence[FileAttack] = (
    FileAttack("split", "10", "a base in two files, one of them listed", _split, must="refuse"),
    FileAttack("split-count", "10", "split.count 2", _metadata("split.count", _UINT16, 2), must="refuse"),
    FileAttack(
        "split-tensors", "10", "split.tensors.count", _metadata("split.tensors.count", _INT32, 1), must="refuse"
    ),
    FileAttack("token-twice", "11", "a token twice in the vocabulary", _token_twice),
    FileAttack("blocks-0", "11", "block_count 0", _metadata("{a}.block_count", _UINT32, 0)),
    FileAttack("blocks-million", "11", "block_count 10^6", _metadata("{a}.block_count", _UINT32, 10**6)),
    FileAttack(
        "epsilon-nan",
        "11",
        "a norm epsilon that is NaN",
        _metadata("{a}.attention.layer_norm_rms_epsilon", _FLOAT32, float("nan")),
    ),
    FileAttack("experts", "11", "expert_count 200000", _metadata("{a}.expert_count", _UINT32, 200_000)),
    FileAttack("experts-used", "11", "expert_used_count 8", _metadata("{a}.expert_used_count", _UINT32, 8)),
    FileAttack("tokenizer-model", "11", "the tokenizer model of another vocabulary", _other_tokenizer),
    FileAttack("heads-0", "11", "head_count 0", _metadata("{a}.attention.head_count", _UINT32, 0)),
    FileAttack("heads-many", "11", "head_count 2^31", _metadata("{a}.attention.head_count", _UINT32, 2**31)),
    FileAttack("rope-0", "11", "rope.freq_base 0", _metadata("{a}.rope.freq_base", _FLOAT32, 0.0)),
    FileAttack(
        "rope-dimensions", "11", "rope.dimension_count 10^6", _metadata("{a}.rope.dimension_count", _UINT32, 10**6)
    ),
    FileAttack("architecture", "11", "the architecture mamba", _metadata("general.architecture", _STRING, "mamba")),
    FileAttack("context", "11", "context_length 2^32 - 1", _metadata("{a}.context_length", _UINT32, 2**32 - 1)),
    FileAttack(
        "eos", "11", "an end token outside the vocabulary", _metadata("tokenizer.ggml.eos_token_id", _UINT32, 2**31)
    ),
    FileAttack("pre-tokenizer", "11", "an unknown pre-tokenizer", _metadata("tokenizer.ggml.pre", _STRING, "\x1b[2J")),
    FileAttack(
        "precompiled",
        "11",
        "a bogus Precompiled normalizer",
        _tokenizer_json(lambda values: values.update(normalizer=_NORMALIZER)),
        engine="onnx",
    ),
    FileAttack(
        "replace",
        "11",
        "a normalizer that doubles each letter 64 times",
        _tokenizer_json(
            lambda values: values.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}] * 64,
                }
            )
        ),
        engine="onnx",
    ),
    FileAttack(
        "operator", "12", "an operator that asks for 4 TB", _graph(_large_constant), engine="onnx", must="refuse"
    ),
    FileAttack("loops", "12", "a chat template with nested loops", _template(_NESTED_LOOPS)),
    FileAttack("division", "12", "a chat template with 1//0", _template("{{ 1//0 }}")),
    FileAttack("recursion", "12", "a chat template that calls itself", _template(_RECURSION)),
    FileAttack("long-text", "12", "a chat template with 'a'*10**10", _template("{{ 'a'*10**10 }}")),
    FileAttack("power", "12", "a chat template with 2**(10**10)", _template("{{ 2**(10**10) }}")),
    FileAttack("center", "12", "a chat template with center(10**10)", _template("{{ 'a'|center(10**10) }}")),
    FileAttack("lora-alpha", "11", "an alpha that is NaN", _adapter([["value", _LORA, _FLOAT32, float("nan")]])),
    FileAttack("lora-counts", "11", "a LoRA with 2^62 tensors", _adapter([["count", 0, 2**62]])),
    FileAttack("fifo", "13", "a FIFO in place of the base", _special(os.mkfifo)),
    FileAttack(
        "fifo-verify",
        "13",
        "a FIFO in place of the base, verified",
        _special(os.mkfifo),
        ("info", "BUNDLE", "--verify"),
    ),
    FileAttack(
        "device",
        "13",
        "/dev/zero in place of the base",
        _special(lambda path: path.symlink_to("/dev/zero")),
        ("info", "BUNDLE", "--verify"),
    ),
    _state("state-about", "saved states whose facts are a list", _head(lambda head: head.update(about=[]))),
    _state("state-bytes", "saved states with 10^30 bytes", _head(lambda head: head.update(bytes=10**30))),
    _state(
        "state-infinite", "saved states with an infinite length", _head(lambda head: head.update(bytes=float("inf")))
    ),
    _state("state-fifo", "a FIFO in place of each saved state", _fifo),
    FileAttack(
        "escape",
        "18",
        "ESC in the bundle's and the base's name",
        _change_manifest(lambda raw: (raw.update(name="\x1b[2Jhome"), raw["base"].update(name="\x1b]0;x\x07"))),
        ("info", "BUNDLE"),
    ),
    FileAttack(
        "escape-adapter",
        "18",
        "ESC in an adapter's method",
        _change_manifest(lambda raw: [entry.update(method="\x1b[2J") for entry in raw["adapters"].values()]),
        ("info", "BUNDLE"),
    ),
    FileAttack(
        "surrogate",
        "18",
        "a lone surrogate in the name",
        _change_manifest(lambda raw: raw.update(name="\ud800")),
        ("info", "BUNDLE"),
    ),
    FileAttack("threads", "11", "10^9 threads", _change_manifest(lambda raw: raw.update(threads=10**9))),
    FileAttack(
        "context-manifest",
        "11",
        "a context of 10^12 tokens",
        _change_manifest(lambda raw: raw.update(context_length=10**12)),
    ),
    FileAttack(
        "kv-bytes",
        "11",
        "kv_values_per_token -1",
        _change_manifest(lambda raw: raw["base"].update(kv_values_per_token=-1)),
    ),
    FileAttack(
        "manifest-deep",
        "11",
        "a manifest 50,000 levels deep",
        lambda bundle: _write(bundle / MANIFEST_NAME, _DEEP.encode()),
        ("info", "BUNDLE"),
    ),
)
