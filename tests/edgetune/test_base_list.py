"""What `edgetune bases` lists, against the architectures, the packages and the pages that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from edgetune_export import architectures, backends
from tiny import MODELS

from edgetune import methods
from edgetune.base_list.facts import PublishedWeights, decoders, published
from edgetune.base_list.tables import page
from edgetune.bases import ALIASES, ENCODER_TYPES, locate
from edgetune.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_in_the_docs_is_up_to_date() -> None:
    written = (DOCS / "bases.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m edgetune.base_list.tables > docs/bases.md"


@pytest.mark.parametrize("item", published(), ids=lambda item: item.hub_id)
def test_weights_name_what_there_is(item: PublishedWeights) -> None:
    assert item.architecture in architectures.names()
    assert set(item.tried) <= set(decoders()[item.architecture].methods)
    assert item.alias is None or item.alias in ALIASES
    for place in item.figures:
        file, _, anchor = place.partition("#")
        titles = re.findall(r"^#+ (.*)$", (DOCS / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {title.lower().replace(" ", "-") for title in titles}


def test_the_size_is_that_of_the_file() -> None:
    (item,) = (item for item in published() if item.alias == "smollm2-135m")
    assert item.mb_in("q4_1") == pytest.approx(locate("smollm2-135m", Path()).stat().st_size / 1e6, rel=0.03)


def test_every_architecture_has_weights_to_begin_with() -> None:
    assert {item.architecture for item in published()} == set(architectures.names())


def test_formats_and_methods_are_those_of_the_architecture() -> None:
    facts = decoders()
    assert set(facts) == set(MODELS)
    assert set(facts["llama"].methods["onnx"]) == set(methods.names())
    assert set(facts["llama"].methods["gguf"]) == {*methods.names()} - {"bottleneck"}
    assert set(facts["olmo2"].methods) == {"gguf"} and facts["olmo2"].held_in("onnx") == "-"
    assert facts["phi3"].without_defaults == ("ia3",)
    assert facts["phi3"].held_in("onnx") == "all; ia3 with listed target_modules"
    assert {name for name, item in facts.items() if item.without_defaults} == {"phi3", "lfm2"}
    for name in ("gemma4", "lfm2", "qwen35"):
        assert {"prefix", "prompt"}.isdisjoint(facts[name].methods["gguf"])
    for name in ("lfm2", "qwen35"):
        assert facts[name].methods["onnx"] == facts[name].methods["gguf"]


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*architectures.names(), *ENCODER_TYPES))
    assert main(["bases", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {"architectures", "encoders", "weights"}
    assert set(values["encoders"]["methods"]) == {"onnx"} < {*backends.names()}
    assert "bottleneck" not in values["encoders"]["methods"]["onnx"]
    assert values["weights"]["Qwen/Qwen3-0.6B"]["mb"] == {"q4_0": 375, "q8_0": 633}
