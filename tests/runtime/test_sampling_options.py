from __future__ import annotations

import re
from dataclasses import fields

from edgetune_runtime.cli.options import SAMPLING
from edgetune_runtime.inference.options import SamplingOptions
from edgetune_runtime.server.common_fields import sampling_options
from edgetune_runtime.server.fields import Fields
from edgetune_runtime.server.settings import ServerLimits
from edgetune_runtime.text.sampling import Sampling

NAMES = {field.name for field in fields(Sampling)}


def test_the_api_and_the_command_line_have_all_options_of_sampling() -> None:
    assert SamplingOptions.__annotations__.keys() == NAMES
    assert {*SAMPLING, "stop"} == NAMES


def test_the_command_line_names_the_defaults_of_sampling() -> None:
    named = {name: re.search(r"\(default: ([\d.]+)", text) for name, (_, text) in SAMPLING.items()}
    assert named.pop("seed") is None
    assert {name: float(found[1]) for name, found in named.items() if found} == {
        name: getattr(Sampling(), name) for name in named
    }


def test_the_server_reads_all_options_of_sampling() -> None:
    body = dict.fromkeys(NAMES, 1) | {"stop": "."}
    assert sampling_options(Fields(body), ServerLimits(), max_tokens=1).keys() == NAMES
