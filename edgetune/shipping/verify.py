"""Exported files and trained checkpoints in, parity of each out: every engine against torch on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from edgetune_export import architectures, backends
from edgetune_export.adapters.shapes import Floats
from edgetune_export.parity import Decoder, Parity, Rows, check, compare
from edgetune_export.parity import TrainedLogits as Model
from edgetune_runtime import engines
from edgetune_runtime.engines.base import Engine, Tokenizer
from edgetune_runtime.engines.gguf.engine import GgufTokenizer

from edgetune import methods
from edgetune.bases import Base, base_context_length
from edgetune.progress import Progress

from .gated import Gated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LogitsOf = Callable[[list[int]], Floats]
"""Token ids to the logits after each, float32 [tokens, vocabulary]."""

States = dict[tuple[int, ...], Any]
"""What a model's output layer reads for each token of a row, by the row."""

# Prompts that are answered greedily, and the length of the answers.
PROMPTS = 3
ANSWER_TOKENS = 24
# What tokenizers tend to cut differently.
HARD_TEXTS = (
    "  two  spaces, a\ttab\r\nand a blank line\n\n",
    "1234567.89 at 07:05, 3x",
    "don't I'LL we\u2019ve DON'T",
    "naïve café Straße ﬁ e\u0301",
    "日本語 한국어 العربية हिन्दी",
    "🏠👨‍👩‍👧 ❤️\u200b\ufeff",
    "def f(x):\n    return {'a': [x, None]}\n",
)
# Rows of each adapter that the plain base is compared on.
BASE_ROWS = 2


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter on its way into a bundle.

    `folder` is what `method` wrote; `probes` are token rows to compare on, the first of them, with `prompt_lengths`, to
    be answered. `texts` are of the task, to compare tokenizers on.
    """

    name: str
    folder: Path
    method: str
    options: methods.MethodOptions
    probes: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int]
    scale: float = 1.0
    system: str | None = None
    metric: str = "exact"
    labels: tuple[str, ...] = ()
    merged: bool = False
    dtypes: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[str] = ()

    def dtype_in(self, target: str) -> str:
        """Number format of the adapter's file in a format, by default that format's own."""
        return self.dtypes.get(target, backends.format_of(target).adapter_dtypes[0])

    def checkpoint(self, base: PreTrainedModel) -> methods.Checkpoint:
        """What was trained, with its base in float32."""
        return methods.Checkpoint(self.name, self.folder, base, self.options, self.scale)


@dataclass(frozen=True)
class WrittenAdapter:
    """One adapter's file and its shape.

    `error` is the share of what was trained that it leaves out; with `invocation` tokens it waits for these;
    `prefix_tokens` are the positions that it takes.
    """

    file: Path
    shape: str
    error: float = 0.0
    invocation: tuple[int, ...] = ()
    prefix_tokens: int = 0
    quantization: str = ""


@dataclass(frozen=True)
class ExportedFormat:
    """What one backend wrote: the base's file, the adapters by name, and how the base's weights are rounded."""

    backend: str
    base: Path
    adapters: Mapping[str, WrittenAdapter]
    quantization: str


@dataclass(frozen=True)
class FormatParity:
    """Parity of a backend's base and of its adapters, by name."""

    base: Parity
    adapters: Mapping[str, Parity] = field(default_factory=dict)


def verify(
    base: Base,
    model: PreTrainedModel,
    adapters: Sequence[TrainedAdapter],
    exports: Sequence[ExportedFormat],
    progress: Progress,
) -> dict[str, FormatParity]:
    """Run every adapter in torch and in each backend's engine on the same tokens, the base last, after switching back.

    `model` holds the base in float32. Raises VerificationError that names the first adapter, or the base, that is
    further from the trained one than its quantization explains.
    """
    # A row may fill all that the base was trained for; then there is no room to answer it.
    longest = max(len(row) for adapter in adapters for row in adapter.probes) + ANSWER_TOKENS
    longest += max(written.prefix_tokens for export in exports for written in export.adapters.values())
    length = min(longest, base_context_length(base.header))
    # What torch computed of each adapter and of the base, for all backends.
    known: dict[str | None, States] = {name: {} for name in (None, *(adapter.name for adapter in adapters))}
    checked = {}
    for export in exports:
        # One engine at a time: beside the model in float32 each holds the base once more.
        with _engine(export.backend, export.base, length) as engine:
            _compare_tokenizers(base.path, export.backend, engine.tokenizer, adapters, progress)
            found = {
                adapter.name: _adapter_parity(
                    model, adapter, export, engine, known=known[adapter.name], progress=progress
                )
                for adapter in adapters
            }
            plain = _remembered(model, model, known[None])
            checked[export.backend] = FormatParity(_base_parity(plain, adapters, export, engine, progress), found)
    return checked


def _adapter_parity(
    model: PreTrainedModel,
    adapter: TrainedAdapter,
    export: ExportedFormat,
    engine: Engine,
    *,
    known: States,
    progress: Progress,
) -> Parity:
    written = export.adapters[adapter.name]
    with methods.load(adapter.method).loaded(adapter.checkpoint(model)) as tuned:
        parity = _parity(_remembered(model, tuned, known), adapter, export, engine)
    progress.say(f"  {export.backend} {adapter.name}: {_said(parity)}")
    check(
        parity,
        adapter.name,
        written.quantization or export.quantization,
        dtype=adapter.dtype_in(export.backend),
        merged=written.shape == "merged",
        error=written.error,
    )
    return parity


def compare_bases(
    first: ExportedFormat, second: ExportedFormat, adapters: Sequence[TrainedAdapter], progress: Progress
) -> Parity:
    """How far the second backend's plain base is from the first's, on rows of the tasks."""
    rows = _base_rows(adapters)
    length = max(map(len, rows))
    with _engine(first.backend, first.base, length) as one, _engine(second.backend, second.base, length) as other:

        def logits(tokens: list[int]) -> Floats:
            one.truncate(0)
            return one.decode_all(tokens)

        parity = compare(logits, other, rows)
    progress.say(f"  bases of {first.backend} and {second.backend} beside each other: {_said(parity)}")
    return parity


def logits_of(model: Any) -> LogitsOf:  # noqa: ANN401 - with or without PEFT around it
    """A function from token ids to the model's logits after each, float32 [tokens, vocabulary]."""
    import torch  # noqa: PLC0415

    def logits(tokens: list[int]) -> Floats:
        with torch.inference_mode():
            return np.asarray(model(input_ids=torch.tensor([tokens])).logits[0].float().numpy(), np.float32)

    return logits


@contextmanager
def _engine(name: str, base: Path, context_length: int) -> Iterator[Engine]:
    made = engines.load(name)
    with closing(made(base, context_length=context_length)) as engine:
        yield engine


def _said(parity: Parity) -> str:
    return f"mean KL {parity.kl:.1e}, {parity.top1:.1%} of top tokens agree"


def _compare_tokenizers(
    base: Path, name: str, tokenizer: Tokenizer, adapters: Sequence[TrainedAdapter], progress: Progress
) -> None:
    """Warn of texts that an engine cuts into other tokens than training did."""
    texts = dict.fromkeys([*HARD_TEXTS, *(text for adapter in adapters for text in adapter.texts)])
    with closing(GgufTokenizer(base)) as trained:
        different = [text for text in texts if tokenizer.tokenize(text) != trained.tokenize(text)]
    if different:
        share = f"{len(different)} of {len(texts)} texts"
        progress.say(f"  warning: {name} cuts {share} into other tokens than training did, such as {different[0]!r}")


def _base_parity(
    plain: Model, adapters: Sequence[TrainedAdapter], export: ExportedFormat, engine: Engine, progress: Progress
) -> Parity:
    engine.activate({})
    parity = compare(plain, engine, _base_rows(adapters))
    progress.say(f"  {export.backend} base after switching back: {_said(parity)}")
    check(parity, "base", export.quantization)
    return parity


def _parity(trained: Model, adapter: TrainedAdapter, export: ExportedFormat, engine: Engine) -> Parity:
    written, active = export.adapters[adapter.name], {adapter.name: adapter.scale}
    if written.shape == "merged":
        with _engine(export.backend, written.file, engine.context_length) as merged:
            return _compare(trained, adapter, merged, engine.context_length)
    engine.load_adapter(adapter.name, written.file, invocation=written.invocation)
    engine.activate(active)
    gated = Gated(engine, active, {adapter.name: written.invocation})
    return _compare(trained, adapter, gated if written.invocation else engine, engine.capacity(active))


def _compare(trained: Model, adapter: TrainedAdapter, engine: Decoder, capacity: int) -> Parity:
    room = capacity - ANSWER_TOKENS
    prompts = [
        row[:length]
        for row, length in zip(adapter.probes[:PROMPTS], adapter.prompt_lengths, strict=False)
        if length <= room
    ]
    return compare(trained, engine, adapter.probes, prompts=prompts, max_tokens=ANSWER_TOKENS)


@dataclass(frozen=True)
class _Logits:
    """Logits of a row, computed from the states that the output layer reads where they are asked for."""

    head: Any
    states: Any
    vocabulary: int
    divisor: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens and vocabulary."""
        return len(self.states), self.vocabulary

    def __getitem__(self, part: slice) -> Floats:
        """The logits after these tokens."""
        import torch  # noqa: PLC0415 - only where something is exported

        with torch.inference_mode():
            return np.asarray((self.head(self.states[part]).float() / self.divisor).numpy(), np.float32)


def _remembered(base: PreTrainedModel, model: Any, known: States) -> Model:  # noqa: ANN401 - with or without PEFT around it
    """The logits of `model`, which is `base` tuned or not: it runs once for each row, however many backends compare."""
    head: Any = base.get_output_embeddings()
    divisor = architectures.of_model_type(base.config.model_type).logits_divisor(base.config)

    def remember(tokens: list[int]) -> Rows:
        key = tuple(tokens)
        if key not in known:
            known[key] = _states(head, model, tokens)
        return _Logits(head, known[key], base.config.vocab_size, divisor)

    return remember


def _states(head: Any, model: Any, tokens: list[int]) -> Any:  # noqa: ANN401 - as above
    """What the output layer reads for each token, float32 [tokens, width]; logits would take many times as much."""
    import torch  # noqa: PLC0415 - only where something is exported

    taken = []

    def take(_: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(inputs[0][0])
        return (inputs[0][:, -1:],)

    hook = head.register_forward_pre_hook(take)
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([tokens]))
    finally:
        hook.remove()
    # Trained positions stand in front of the tokens.
    return taken[0][-len(tokens) :].clone()


def _base_rows(adapters: Sequence[TrainedAdapter]) -> list[Sequence[int]]:
    return [row for adapter in adapters for row in adapter.probes[:BASE_ROWS]]
