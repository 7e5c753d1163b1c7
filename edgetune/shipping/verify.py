"""The parity check of decoders: compares every engine with torch, on the same weights and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgetune_export import architectures, backends
from edgetune_export.adapters.shapes import Floats, Merged
from edgetune_export.parity import (
    TOLERANCE_KL,
    TOLERANCE_KL_MERGED,
    Decoder,
    Parity,
    Rows,
    check,
    check_kept,
    compare,
)
from edgetune_export.parity import TrainedLogits as Model
from edgetune_runtime import engines
from edgetune_runtime.engines.base import Engine, Tokenizer
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.bases import Base, trained_context_length
from edgetune.common.progress import Progress
from edgetune.training.rounding import rounded_layers
from edgetune.training.step_threads import StepThreads

from .exported import ExportedFormat, Figures, ParityReport, TrainedAdapter
from .parity_engines import ActivatedLoraEngine, GovernedEngine

LogitsOf = Callable[[list[int]], Floats]
"""From token ids to the logits after each, float32 [tokens, vocabulary]."""

# Number of prompts that are answered greedily, and the length of the answers.
PROMPTS = 3
ANSWER_TOKENS = 24
# Texts that tokenizers often split differently.
HARD_TEXTS = (
    "  two  spaces, a\ttab\r\nand a blank line\n\n",
    "1234567.89 at 07:05, 3x",
    "don't I'LL we\u2019ve DON'T",
    "naïve café Straße ﬁ e\u0301",
    "日本語 한국어 العربية हिन्दी",
    "🏠👨‍👩‍👧 ❤️\u200b\ufeff",
    "def f(x):\n    return {'a': [x, None]}\n",
)
# Rows per adapter for comparing the plain base.
BASE_ROWS = 2


def verify(
    base: Base,
    model: PreTrainedModel,
    adapters: Sequence[TrainedAdapter],
    exports: Sequence[ExportedFormat],
    progress: Progress,
) -> ParityReport:
    """Run every adapter in torch and in each backend's engine on the same tokens, the base last, after switching back.

    `model` is the base in float32. Raises VerificationError that names the first adapter, or the base, whose difference
    from the trained one is larger than its quantization explains.
    """
    # A row may fill the whole context of the base; then it is not answered.
    longest = max(len(row) for adapter in adapters for row in adapter.probes) + ANSWER_TOKENS
    longest += max(written.prefix_tokens for export in exports for written in export.adapters.values())
    length = min(longest, trained_context_length(base.header))
    trained = _Trained(model, StepThreads(is_cpu=True))
    bases: dict[str, Figures] = {}
    checked: dict[str, dict[str, Figures]] = {}
    try:
        for export in exports:
            # One engine at a time, because each loads another copy of the base.
            with _engine(export.backend, export.base, length) as engine:
                _compare_tokenizers(base.path, export.backend, engine.tokenizer, adapters, progress)
                checked[export.backend] = {}
                for adapter in adapters:
                    parity = _adapter_parity(base.path, trained, adapter, export, engine, progress=progress)
                    checked[export.backend][adapter.name] = parity.figures()
                    if export is exports[-1]:
                        trained.forget(adapter.name)
                plain = trained.logits(model, None)
                bases[export.backend] = _base_parity(plain, adapters, export, engine, progress).figures()
    finally:
        trained.threads.restore()
    return ParityReport(bases, checked)


def _adapter_parity(
    base: Path,
    trained: _Trained,
    adapter: TrainedAdapter,
    export: ExportedFormat,
    engine: Engine,
    *,
    progress: Progress,
) -> Parity:
    written = export.adapters[adapter.name]
    method, rounds_to = methods.load(adapter.plan.method), base if adapter.plan.on_grid else None
    # On the grid, torch computes with the weights that the file has.
    is_rounded = adapter.plan.shapes[export.backend] == Merged.shape and not adapter.plan.on_grid
    with method.loaded(adapter.checkpoint(trained.base)) as tuned, rounded_layers(tuned, rounds_to):
        logits = trained.logits(tuned, adapter.name)
        parity = _parity(logits, adapter, export, engine)
        progress.say(f"  {export.backend} {adapter.name}: {_described(parity)}")
        check(
            parity,
            adapter.name,
            written.weight_type or export.weight_type,
            types=written.values_by_type,
            merged=is_rounded,
            error=written.error,
            requantized_kl=backends.format_of(export.backend).requantized_kl,
        )
        if is_rounded:
            _check_kept(logits, adapter, export, engine)
    # There may be hundreds.
    engine.activate({})
    engine.unload_adapter(adapter.name)
    return parity


def _check_kept(trained: Model, adapter: TrainedAdapter, export: ExportedFormat, engine: Engine) -> None:
    """Check on the answers of the probes that rounding to fewer than 8 bits has not undone the training."""
    written = export.adapters[adapter.name]
    kind = TENSOR_TYPES.get(written.weight_type)
    if kind is None or kind.bits >= TENSOR_TYPES["q8_0"].bits:
        return
    tolerances = TOLERANCE_KL if kind.name == export.weight_type else TOLERANCE_KL_MERGED
    # The logits after the last token of a prompt are those of the answer's first.
    compared = partial(
        compare, trained, rows=adapter.probes, starts=[max(1, length - 1) for length in adapter.prompt_lengths]
    )
    engine.activate({})
    plain = compared(engine=GovernedEngine(engine))
    with _engine(export.backend, written.file, engine.context_length) as merged:
        noise = tolerances.get(kind.name, max(tolerances.values()))
        check_kept(compared(engine=GovernedEngine(merged)), plain, adapter.name, kind.name, noise)


def compare_formats(
    adapters: Sequence[TrainedAdapter], exports: Sequence[ExportedFormat], progress: Progress
) -> dict[str, Figures]:
    """Compare the first format's plain base with that of each other format; figures by pair, such as `gguf/onnx`."""
    first, *others = exports
    return {
        f"{first.backend}/{other.backend}": _compare_bases(first, other, adapters, progress).figures()
        for other in others
    }


def _compare_bases(
    first: ExportedFormat, second: ExportedFormat, adapters: Sequence[TrainedAdapter], progress: Progress
) -> Parity:
    rows = _base_rows(adapters)
    length = max(map(len, rows))
    with _engine(first.backend, first.base, length) as one, _engine(second.backend, second.base, length) as other:
        governed = GovernedEngine(one)

        def logits(tokens: list[int]) -> Floats:
            governed.truncate(0)
            return governed.decode_all(tokens)

        parity = compare(logits, GovernedEngine(other), rows)
    progress.say(f"  bases of {first.backend} and {second.backend} beside each other: {_described(parity)}")
    return parity


def logits_of(model: Any) -> LogitsOf:  # noqa: ANN401 - with or without PEFT around it
    """A function from token ids to the model's logits after each, float32 [tokens, vocabulary]."""

    def logits(tokens: list[int]) -> Floats:
        with torch.inference_mode():
            return np.asarray(model(input_ids=torch.tensor([tokens])).logits[0].float().numpy(), np.float32)

    return logits


@contextmanager
def _engine(name: str, base: Path, context_length: int) -> Iterator[Engine]:
    engine_class = engines.load(name)
    with closing(engine_class(base, context_length=context_length)) as engine:
        yield engine


def _described(parity: Parity) -> str:
    return f"mean KL {parity.kl:.1e}, {parity.top1:.1%} of top tokens agree"


def _compare_tokenizers(
    base: Path, name: str, tokenizer: Tokenizer, adapters: Sequence[TrainedAdapter], progress: Progress
) -> None:
    """Warn of texts that an engine tokenizes differently from training."""
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
    parity = compare(plain, GovernedEngine(engine), _base_rows(adapters))
    progress.say(f"  {export.backend} base after switching back: {_described(parity)}")
    check(parity, None, export.weight_type, requantized_kl=backends.format_of(export.backend).requantized_kl)
    return parity


def _parity(trained: Model, adapter: TrainedAdapter, export: ExportedFormat, engine: Engine) -> Parity:
    written, active = export.adapters[adapter.name], {adapter.name: adapter.plan.spec.scale}
    if adapter.plan.shapes[export.backend] == Merged.shape:
        with _engine(export.backend, written.file, engine.context_length) as merged:
            return _compare(trained, adapter, GovernedEngine(merged), engine.context_length)
    engine.load_adapter(adapter.name, written.file, invocation=written.invocation)
    engine.activate(active)
    governed = GovernedEngine(engine)
    decoder: Decoder = governed
    if written.invocation:
        decoder = ActivatedLoraEngine(governed, active, {adapter.name: written.invocation})
    return _compare(trained, adapter, decoder, engine.capacity(active))


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
    """The logits of a row, computed on demand from the inputs of the base's output layer."""

    base: PreTrainedModel
    states: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens and vocabulary."""
        return len(self.states), self.base.config.vocab_size

    def __getitem__(self, part: slice) -> Floats:
        """The logits after these tokens."""
        config, head = self.base.config, self.base.get_output_embeddings()
        with torch.inference_mode():
            output = head(self.states[part]).float()
            logits = architectures.of_model_type(config.model_type).logits_of(output, config)
        return np.asarray(logits.numpy(), np.float32)


@dataclass(frozen=True)
class _Trained:
    """The base in torch, and what it computed: each row runs once with each adapter, for all formats.

    `states` has the inputs of the output layer for each token, by adapter (None: the plain base) and row.
    """

    base: PreTrainedModel
    threads: StepThreads
    states: dict[tuple[str | None, tuple[int, ...]], Any] = field(default_factory=dict)

    def logits(self, tuned: Any, name: str | None) -> Model:  # noqa: ANN401 - with or without PEFT around it
        """The logits of the base with the adapter `name`, which is `tuned`."""
        head = self.base.get_output_embeddings()

        def logits(tokens: list[int]) -> Rows:
            key = name, tuple(tokens)
            if key not in self.states:
                with self.threads.step(len(tokens)):
                    self.states[key] = _states(head, tuned, tokens)
            return _Logits(self.base, self.states[key])

        return logits

    def forget(self, name: str) -> None:
        """Drop what was computed with the adapter `name`."""
        for key in [key for key in self.states if key[0] == name]:
            del self.states[key]


def _states(head: Any, model: Any, tokens: list[int]) -> Any:  # noqa: ANN401 - as above
    """The inputs of the output layer for each token, float32 [tokens, width]; logits would need much more memory."""
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
    # The positions of a prefix come before the tokens.
    return taken[0][-len(tokens) :].clone()


def _base_rows(adapters: Sequence[TrainedAdapter]) -> list[Sequence[int]]:
    return [row for adapter in adapters for row in adapter.probes[:BASE_ROWS]]
