from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from edgetune_export import architectures
from edgetune_export.base_file import llama_cpp_source, run_converter
from edgetune_export.base_file.cache import cache_folder
from edgetune_export.base_file.convert import SCRIPT, check_folder, convert_folder, find_converter
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import read_header
from tiny import ARCHITECTURES

VERSION = importlib.metadata.version("llama-cpp-python")
LONG = '{"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.5]}}'
MULTIMODAL = '{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}'
LLAMA = '{"model_type": "llama"}'
INDEX = "model.safetensors.index.json"
ELSEWHERE = '{"weight_map": {"a": "../x.safetensors", "b": "model.safetensors"}}'
WHOLE = {"config.json": LLAMA, "model.safetensors": ""}
PART = "model-00001-of-00001.safetensors"
PARTS = json.dumps({"weight_map": {"a": PART}})
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": 9,
}
LISTED_ROTATION = json.dumps({**GEMMA4, "rope_parameters": [1]})
NO_ROTATION = '{"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 1]}'
GRANITE = {
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 2,
    "num_local_experts": 0,
    "position_embedding_type": "rope",
    "layer_types": ["attention", "full_attention"],
}
HYBRID = json.dumps({**GRANITE, "layer_types": ["mamba", "attention"]})
EXPERTS = json.dumps({**GRANITE, "num_local_experts": 8})
UNROTATED = json.dumps({**GRANITE, "position_embedding_type": None})
NO_ALPHA = '{"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "factor": 2.0}}'
BITSANDBYTES = '{"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}'
BIASED = '{"model_type": "ernie4_5", "use_bias": true}'
# A build backend without dependencies, as pip asks a source distribution for its metadata.
BACKEND = f"""\
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    made = Path(folder, "llama_cpp_python-{VERSION}.dist-info")
    made.mkdir()
    made.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: {VERSION}\\n")
    return made.name
"""
SDIST = {
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
    "PKG-INFO": f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {VERSION}\n",
    f"vendor/llama.cpp/{SCRIPT}": "print('converter')\n",
    "vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
    "vendor/llama.cpp/src/llama.cpp": "int main() {}\n",
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes for its only index, and an empty cache of edgetune's."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_sdist(index: Path, leave_out: str = "") -> None:
    name = f"llama_cpp_python-{VERSION}"
    with tarfile.open(index / f"{name}.tar.gz", "w:gz") as tar:
        for path, text in SDIST.items():
            if path.endswith(leave_out) and leave_out:
                continue
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))


def assert_refused(kind: type[EdgetuneError], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_given_converter_is_a_checkout_or_its_script(tmp_path: Path) -> None:
    script = tmp_path / SCRIPT
    script.touch()
    assert find_converter(tmp_path) == find_converter(script) == script


def test_a_given_converter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for given in (tmp_path / "none", tmp_path, tmp_path / SCRIPT):
        message = f"{given} has no {SCRIPT}; use a llama.cpp checkout"
        assert_refused(NotFoundError, message, lambda given=given: find_converter(given))  # type: ignore[misc]


def test_the_converter_is_fetched_once_and_no_module_of_the_working_folder_is_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(llama_cpp_source.SDIST_SHA256, VERSION, raising=False)
    put_sdist(index)
    work = tmp_path / "work"
    work.mkdir()
    (work / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(work)
    script = find_converter()
    assert [path.name for path in work.iterdir()] == ["pip.py"]
    assert script.read_text(encoding="utf-8") == "print('converter')\n"
    kept = {path.relative_to(script.parent).as_posix() for path in script.parent.rglob("*") if path.is_file()}
    assert kept == {SCRIPT, "gguf-py/gguf/__init__.py"}
    # Nothing but the converter is left in the cache, and pip would find nothing now.
    assert [path.name for path in script.parent.parent.iterdir()] == [f"llama-cpp-python-{VERSION}"]
    shutil.rmtree(index)
    assert find_converter() == script


def test_a_cache_folder_that_cannot_be_written_says_how_to_move_it(index: Path) -> None:
    (index.parent / "cache").touch()
    message = f"cannot write to the cache folder {index.parent}/cache/edgetune: Not a directory; set XDG_CACHE_HOME to"
    assert_refused(UsageError, message, find_converter)


def test_the_same_variable_moves_the_cache_on_all_systems(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _name: "of another system")
    assert cache_folder() == index.parent / "cache/edgetune"


@pytest.mark.parametrize("is_known", [True, False])
def test_code_of_a_source_distribution_runs_only_if_its_digest_is_the_known_one(
    is_known: bool, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setitem(SDIST, "backend.py", f"open({str(ran)!r}, 'w').close()\n{BACKEND}")
    put_sdist(index)
    (archive,) = index.iterdir()
    monkeypatch.setitem(llama_cpp_source.SDIST_SHA256, VERSION, sha256_of(archive) if is_known else "00" * 32)
    if is_known:
        assert find_converter().is_file()
    else:
        assert_refused(VerificationError, "does not have the expected sha256 0000", find_converter)
        assert list((index.parent / "cache/edgetune").iterdir()) == []
    assert ran.exists() == is_known


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nothing", NotFoundError, "connect to the network once, or give a llama.cpp checkout as the converter"),
        ("sdist without the script", VerificationError, f"has no {SCRIPT}"),
    ],
)
def test_an_unavailable_converter_is_an_error_and_leaves_no_files(
    given: str, error: type[EdgetuneError], message: str, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(llama_cpp_source.SDIST_SHA256, VERSION, raising=False)
    if given != "nothing":
        put_sdist(index, leave_out=SCRIPT)
    assert_refused(error, message, find_converter)
    assert list((index.parent / "cache/edgetune").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, NotFoundError, "has no config.json; use a Hugging Face model folder"),
        ({"config.json": "{"}, VerificationError, "is not JSON"),
        ({"config.json": "[" * 100_000}, VerificationError, "is not JSON"),
        ({"config.json": "[]"}, VerificationError, "is not a JSON object"),
        ({"config.json": "{}"}, VerificationError, "has no model_type"),
        ({"config.json": '{"model_type": "gpt2"}', "model.safetensors": ""}, IncompatibleError, "architecture 'gpt2'"),
        ({"config.json": '{"model_type": ["llama"]}'}, VerificationError, "has no model_type"),
        ({"config.json": '{"model_type": "phi3", "rope_scaling": "long"}'}, VerificationError, "is damaged"),
        ({"config.json": LISTED_ROTATION}, VerificationError, "is damaged"),
        (
            {"config.json": '{"model_type": "smollm3", "num_hidden_layers": 1e9}'},
            VerificationError,
            "num_hidden_layers",
        ),
        ({"config.json": '{"model_type": "smollm3", "num_hidden_layers": 100000000}'}, VerificationError, "num_hidden"),
        ({"config.json": LONG}, IncompatibleError, "a Phi with scaled or partial rotary embeddings"),
        ({"config.json": NO_ROTATION}, IncompatibleError, "other no_rope_layers than SmolLM3-3B"),
        ({"config.json": HYBRID}, IncompatibleError, "Mamba layers, experts or no rotary embedding"),
        ({"config.json": EXPERTS}, IncompatibleError, "Mamba layers, experts or no rotary embedding"),
        ({"config.json": UNROTATED}, IncompatibleError, "Mamba layers, experts or no rotary embedding"),
        ({"config.json": NO_ALPHA}, IncompatibleError, "rotary embedding (dynamic) without alpha"),
        ({"config.json": BIASED}, IncompatibleError, "an ERNIE with biases"),
        (
            {"config.json": BITSANDBYTES},
            IncompatibleError,
            "is quantized with bitsandbytes, which is not supported; use the same model without",
        ),
        ({"config.json": LLAMA, "pytorch_model.bin": ""}, NotFoundError, "no .safetensors file"),
        ({"config.json": LLAMA, "pytorch_model.bin": "", "x.safetensors": ""}, NotFoundError, "no .safetensors file"),
        ({"config.json": LLAMA, "model.safetensors": "", INDEX: ELSEWHERE}, VerificationError, "names '../x.safe"),
        ({"config.json": LLAMA, "model.safetensors": "", INDEX: "[]"}, VerificationError, "names 'None'"),
        ({"config.json": LLAMA, "model-00002-of-00003.safetensors": ""}, VerificationError, "has 1 of the 3 .safeten"),
        ({**WHOLE, "model_old.safetensors": ""}, VerificationError, "has 'model_old.safetensors', which transformers"),
        (
            {**WHOLE, "model-00001-of-00001.safetensors": ""},
            VerificationError,
            "has 'model-00001-of-00001.safetensors'",
        ),
        ({"config.json": LLAMA, "model-x.safetensors": ""}, VerificationError, "keep only model.safetensors, or the"),
        ({**WHOLE, PART: "", INDEX: PARTS}, VerificationError, "has 'model.safetensors'"),
        (
            {"config.json": LLAMA, "model-1-of-2.safetensors": "", INDEX: PARTS},
            VerificationError,
            "has 0 of the 1 ",
        ),
        ({"config.json": MULTIMODAL}, IncompatibleError, "is a multimodal model (gemma3), of which only the text part"),
        ({"config.json": MULTIMODAL.replace("gemma3", "gemma3n")}, IncompatibleError, "architecture 'gemma3n_text' of"),
    ],
)
def test_a_folder_that_cannot_be_converted_is_refused_before_any_work(
    files: dict[str, str], error: type[EdgetuneError], message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert_refused(error, message, lambda: check_folder(tmp_path))
    # No converter was looked for: this one does not exist.
    out = tmp_path / "out.gguf"
    assert_refused(error, message, lambda: convert_folder(tmp_path, out, converter=tmp_path / "none"))
    assert not out.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, "tokenizer.model", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_folder_with_a_pipe_or_a_device_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    for file, text in WHOLE.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    message = f"{tmp_path / name} is not a regular file; download the model again"
    assert_refused(VerificationError, message, lambda: check_folder(tmp_path))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_of_a_folder_is_read_up_to_a_limit(name: str, tmp_path: Path) -> None:
    for file, text in WHOLE.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 30)
    message = f"{tmp_path / name} is larger than 64 MiB"
    assert_refused(VerificationError, message, lambda: check_folder(tmp_path))


def write_code(folder: Path, **changes: dict[str, Any]) -> Path:
    """Change JSON files of a folder, and give it a class of its own; the returned file appears when that is run."""
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n", encoding="utf-8")
    for name, change in changes.items():
        path = folder / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**found, **change}), encoding="utf-8")
    return marker


OWN_TOKENIZER = {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
OWN_CONFIG = {"auto_map": {"AutoConfig": "own.Own"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": OWN_CONFIG}, "config.json has auto_map"),
        ({"tokenizer_config": OWN_TOKENIZER}, "tokenizer_config.json has auto_map"),
        ({"config": {"text_config": [OWN_CONFIG]}}, "config.json has auto_map"),
        ({"config": {"configuration_files": ["config.4.0.json"]}}, "config.json has configuration_files"),
        ({"config": {"architectures": ["DreamModel"]}}, "has architectures \"['DreamModel']\"; a llama has"),
        ({"config": {"architectures": ["Qwen2ForCausalLM"]}}, "a llama has ['LlamaForCausalLM']"),
        ({"config": {"architectures": ["LlamaForCausalLM", "DreamModel"]}}, "has architectures"),
        ({"config": {"architectures": None}}, "has architectures 'None'"),
        ({"config": {"thinker_config": {"text_config": {"architectures": ["DreamModel"]}}}}, "has architectures"),
    ],
)
def test_a_folder_that_brings_code_or_another_class_is_refused(
    changes: dict[str, Any], message: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "base")
    marker = write_code(folder, **changes)
    assert_refused(IncompatibleError, message, lambda: convert_folder(folder, tmp_path / "out.gguf"))
    assert not marker.exists()


# Runs programs, given as JSON, each in a fork of a process that has imported what takes them 3 s to import.
FORKED = """\
import json, os, runpy, sys
import transformers.modeling_utils, transformers.models.auto.tokenization_auto
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_the_converter_runs_no_code_of_a_folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    script, programs, markers = find_converter(), [], []
    # The script alone does: it passes trust_remote_code=True for these classes.
    for model_class, tokenizer_class in (("DreamModel", "Own"), ("LlamaForCausalLM", "HybridDNATokenizer")):
        for command in ([str(script)], [run_converter.__file__, str(script)]):
            folder = tmp_path / f"base{len(programs)}"
            shutil.copytree(tiny_folder("llama"), folder)
            (folder / "tokenizer.model").unlink()
            (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
            settings = {"tokenizer_class": tokenizer_class, **OWN_TOKENIZER}
            markers.append(write_code(folder, config={"architectures": [model_class]}, tokenizer_config=settings))
            programs.append([*command, str(folder), "--outfile", str(tmp_path / "out.gguf")])
    words = [sys.executable, "-c", FORKED, json.dumps(programs)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(words, capture_output=True, env=environment, stdin=subprocess.DEVNULL, text=True, check=True)
    assert all(code != "0" for code in done.stdout.split()), done.stderr
    assert [marker.exists() for marker in markers] == [True, False, True, False], done.stderr


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_folder_and_its_file_have_the_same_architecture(
    arch: str, tiny_folder: Callable[[str], Path], tiny_gguf: Callable[[str], Path]
) -> None:
    header = read_header(tiny_gguf(arch))
    assert check_folder(tiny_folder(arch)).gguf == header.architecture
    assert architectures.of(header).gguf == header.architecture


def test_a_folder_that_llama_cpp_refuses_gives_its_last_words(
    forked_converter: None, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "broken")
    (folder / "tokenizer.model").write_bytes(b"no model")
    out = tmp_path / "out.gguf"
    assert_refused(IncompatibleError, "ModelProto", lambda: convert_folder(folder, out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("lfm2", {"num_key_value_heads": None}),
        ("lfm2", {"intermediate_size": "64", "block_auto_adjust_ff_dim": False}),
        ("lfm2", {"block_multiple_of": 0}),
        ("lfm2", {"block_ffn_dim_multiplier": float("inf")}),
        ("qwen35", {"linear_num_key_heads": "2", "linear_num_value_heads": "2"}),
        ("qwen35", {"linear_conv_kernel_dim": None}),
    ],
)
def test_odd_sizes_of_recurrent_layers_are_damage(
    model: str, change: dict[str, object], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder(model), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(VerificationError, match=r"config\.json"):
        check_folder(folder)


@pytest.mark.parametrize("keys", [0, 4])
def test_value_heads_that_are_no_multiple_of_the_key_heads_are_refused(
    keys: int, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("qwen35"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "linear_num_key_heads": keys}))
    message = f"6 value heads, which is not a multiple of its {keys} key heads"
    assert_refused(IncompatibleError, message, lambda: check_folder(folder))
