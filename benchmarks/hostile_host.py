"""Attacks by files that the host reads: recipes and folders of PEFT; each is written beside a copy of the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.formats.gguf_file import read_header
from safetensors.numpy import save_file

from benchmarks.hostile_files import FileAttack

_IMPORT_S = 60.0
"""For a command that imports torch first, on a busy machine."""
_RECIPE = "name: home\nbase: smollm2-135m\nadapters: {a: {data: {train: a.jsonl}}}\n"


def _bomb(bundle: Path) -> None:
    """Nine levels of nine aliases: 9^9 texts."""
    levels = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    text = "\n".join([*levels, "name: *a9", ""])
    (bundle.parent / "recipe.yaml").write_text(text, encoding="utf-8")


def _deep(bundle: Path) -> None:
    (bundle.parent / "recipe.yaml").write_text(_RECIPE + "targets: " + "[" * 20_000, encoding="utf-8")


def _peft(**config: object) -> Callable[[Path], None]:
    """Writes a LoRA on one module, with these values in its adapter_config.json."""

    def change(bundle: Path) -> None:
        folder = bundle.parent / "peft"
        folder.mkdir()
        header = read_header(bundle / read_manifest(bundle).base.files["gguf"])
        columns, rows = header.tensors["blk.0.attn_q.weight"].shape
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        a, b = np.zeros((2, columns), np.float32), np.zeros((rows, 2), np.float32)
        save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
        values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none", **config}
        (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")

    return change


def _export(name: str, does: str, **config: object) -> FileAttack:
    words = ("export", "--base", "BASE", "--adapter", "a=WORK/peft", "--out", "WORK/out-bundle", "--quiet")
    return FileAttack(name, "18", does, _peft(**config), words, program="edgetune", longest_s=_IMPORT_S)


def _validate(name: str, does: str, change: Callable[[Path], object]) -> FileAttack:
    words = ("plan", "WORK/recipe.yaml")
    return FileAttack(name, "18", does, change, words, must="refuse", program="edgetune", longest_s=_IMPORT_S)


ATTACKS: Sequence[FileAttack] = (
    _validate("alias-bomb", "a recipe of 9^9 aliases", _bomb),
    _validate("recipe-deep", "a recipe 20,000 levels deep", _deep),
    _export("rank-pattern", "a rank_pattern that never ends", rank_pattern={r"((\w|\w)+\.*)*!": 2}),
    _export("rank-huge", "a rank of 10^12", r=10**12),
    _export("targets-pattern", "target_modules that never end", target_modules=r"((\w|\w)+\.*)*!"),
)
