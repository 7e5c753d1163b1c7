from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from edgetune_export.adapters import patterns
from edgetune_export.adapters.fold import CONFIG_NAME, WEIGHTS_NAME, fold_peft, merge
from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}


def write_folder(folder: Path, tensors: dict[str, Any] | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps({**CONFIG, **config}))
    if tensors is None:
        tensors = {KEY.format("A"): np.ones((2, 8), np.float32), KEY.format("B"): np.ones((6, 2), np.float32)}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS_NAME)
    return folder


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns"])
def test_folded_deltas_are_those_that_peft_computes(tune: Callable[..., Any], kind: str) -> None:
    tuned = tune("qwen3", kind)
    folded = fold_peft(tuned.folder, "command")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in tuned.peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(folded.modules) == set(layers)
    for name, delta in folded.modules.items():
        expected = layers[name].get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta.b @ delta.a, expected, atol=1e-6)


def test_patterns_give_modules_their_own_ranks(tune: Callable[..., Any]) -> None:
    modules = fold_peft(tune("llama", "patterns").folder, "command").modules
    assert modules["model.layers.0.self_attn.q_proj"].rank == 4
    assert modules["model.layers.1.mlp.up_proj"].rank == 12
    assert modules["model.layers.0.mlp.up_proj"].rank == 8


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight",
        "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_{}.weight",
        "module.base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight",
        "_orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_{}.weight",
        "base_model.model.layers.0.self_attn.q_proj.lora_{}.weight",
        "model.layers.0.self_attn.q_proj.lora_{}.weight",
    ],
)
def test_names_that_other_trainers_write_fold_to_the_same_module(tmp_path: Path, key: str) -> None:
    a, b = np.ones((2, 8), np.float32), np.ones((6, 2), np.float32)
    folder = write_folder(tmp_path / "peft", {key.format("A"): a, key.format("B"): b})
    folded = fold_peft(folder, "command")
    assert list(folded.modules) == [MODULE]
    np.testing.assert_array_equal(folded.modules[MODULE].b, 2 * b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_float_types_are_read(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file  # noqa: PLC0415

    folder = write_folder(tmp_path / "peft")
    values = torch.tensor([[0.5, -3.0]] * 6, dtype=getattr(torch, dtype))
    save_file({KEY.format("A"): torch.ones(2, 8), KEY.format("B"): values}, folder / WEIGHTS_NAME)
    np.testing.assert_array_equal(fold_peft(folder, "command").modules[MODULE].b, [[1.0, -6.0]] * 6)


# PEFT warns of some of what edgetune refuses.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.lora_embedding_A"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_trains_beyond_plain_lora_is_refused_with_a_way_out(
    tiny_folder: Callable[[str], Path],
    save_random_adapter: Callable[..., Any],
    tmp_path: Path,
    options: dict[str, Any],
    named: str,
) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], **options}
    folder = save_random_adapter(tiny_folder("llama"), tmp_path, options).folder
    with pytest.raises(IncompatibleError, match=re.escape(named)) as caught:
        fold_peft(folder, "command")
    assert "'command'" in caught.value.message
    assert "merge_and_unload" in caught.value.remedy


def test_an_activated_lora_keeps_its_invocation_and_is_not_merged(
    tiny_folder: Callable[[str], Path], save_random_adapter: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]}
    folded = fold_peft(save_random_adapter(tiny_folder("llama"), tmp_path, options).folder, "command")
    assert folded.invocation == (5, 6)
    with pytest.raises(IncompatibleError, match="'command' acts only after its invocation tokens and cannot be merged"):
        merge(folded, lambda _: np.zeros((64, 64), np.float32))


@pytest.mark.parametrize("tokens", ["<|im_start|>", [5, "6"], [5, -1], [True], [2**40], {"5": 6}])
def test_invocation_tokens_that_are_none_are_refused(tmp_path: Path, tokens: object) -> None:
    with pytest.raises(VerificationError, match="is damaged: alora_invocation_tokens is "):
        fold_peft(write_folder(tmp_path / "peft", alora_invocation_tokens=tokens), "command")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"fan_in_fan_out": True},
        {"target_parameters": ["experts.up_proj"]},
        {"use_qalora": True},
        {"kasa_config": {"beta": 1}},
        {"init_lora_weights": "pissa_niter_16"},
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    ((key, _),) = config.items()
    with pytest.raises(IncompatibleError, match=key):
        fold_peft(write_folder(tmp_path / "peft", **config), "command")


def test_all_refused_options_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"use_dora.*modules_to_save.*bias: all"):
        fold_peft(write_folder(tmp_path / "peft", use_dora=True, modules_to_save=["score"], bias="all"), "command")


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    key = KEY.format("A").replace("lora_A.weight", "lora_magnitude_vector")
    tensors = {KEY.format(side): np.ones((2, 2), np.float32) for side in "AB"} | {key: np.ones(2, np.float32)}
    with pytest.raises(IncompatibleError, match=re.escape(key)):
        fold_peft(write_folder(tmp_path / "peft", tensors), "command")


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    keys = [KEY.format(side).replace(".weight", f".{name}.weight") for side in "AB" for name in ("first", "second")]
    with pytest.raises(IncompatibleError, match="first, second"):
        fold_peft(write_folder(tmp_path / "peft", {key: np.ones((2, 2), np.float32) for key in keys}), "command")


def test_a_folder_without_an_adapter_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=CONFIG_NAME):
        fold_peft(tmp_path / "nowhere", "command")
    (write_folder(tmp_path / "peft") / WEIGHTS_NAME).unlink()
    with pytest.raises(NotFoundError, match=WEIGHTS_NAME):
        fold_peft(tmp_path / "peft", "command")


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "peft")
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(IncompatibleError, match="safetensors"):
        fold_peft(folder, "command")


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe", "[" * 100_000, '"LORA"'])
def test_a_broken_config_is_one_clear_error(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "peft")
    (folder / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(VerificationError, match=CONFIG_NAME):
        fold_peft(folder, "command")


def test_a_config_that_is_a_pipe_or_too_large_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "peft") / CONFIG_NAME
    path.write_text(json.dumps({**CONFIG, "target_modules": "q" * (1 << 20)}))
    with pytest.raises(VerificationError, match=f"{CONFIG_NAME} has more than 1048576 bytes"):
        fold_peft(path.parent, "command")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(VerificationError, match=f"{CONFIG_NAME} is not a regular file"):
        fold_peft(path.parent, "command")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": "8"},
        {"r": True},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"q_proj": "much"}},
    ],
)
def test_numbers_that_cannot_be_are_named(tmp_path: Path, config: dict[str, Any]) -> None:
    ((key, _),) = config.items()
    with pytest.raises(VerificationError, match=key):
        fold_peft(write_folder(tmp_path / "peft", **config), "command")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_never_ends_is_refused(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 1.0)
    folder = write_folder(tmp_path / "peft", **{key: {r"(\w|.)*!": 4}})
    with pytest.raises(IncompatibleError, match=rf"{key} in .* takes more than 1 s; write module names") as caught:
        fold_peft(folder, "command")
    assert "\n" not in str(caught.value)


def damaged(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    values = {"A": np.ones((2, 8), np.float32), "B": np.ones((6, 2), np.float32), **changes}
    return {KEY.format(side): value for side, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (damaged(B=None), "only lora_A or lora_B"),
        (damaged(B=np.ones((6, 3), np.float32)), "do not match"),
        (damaged(A=np.ones(2, np.float32)), "do not match"),
        (damaged(A=np.ones((0, 8), np.float32), B=np.ones((6, 0), np.float32)), "do not match"),
        (
            damaged(A=np.ones((4, 8), np.float32), B=np.ones((6, 4), np.float32)),
            "rank 4, but adapter_config.json has 2",
        ),
        (damaged(A=np.full((2, 8), np.nan, np.float32)), "not finite"),
        ({"unrelated.base_layer.weight": np.ones(2, np.float32)}, "no LoRA weights"),
    ],
)
def test_weights_that_do_not_fit_together_are_named(tmp_path: Path, tensors: dict[str, Any], what: str) -> None:
    with pytest.raises(VerificationError, match=what):
        fold_peft(write_folder(tmp_path / "peft", tensors), "command")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="I32"):
        fold_peft(write_folder(tmp_path / "peft", damaged(A=np.ones((2, 8), np.int32))), "command")


def test_a_truncated_weight_file_is_damaged(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "peft")
    data = (folder / WEIGHTS_NAME).read_bytes()
    for length in (0, 4, len(data) // 2, len(data) - 1):
        (folder / WEIGHTS_NAME).write_bytes(data[:length])
        with pytest.raises(VerificationError, match=WEIGHTS_NAME):
            fold_peft(folder, "command")
