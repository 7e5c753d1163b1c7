"""Cartridges, through PEFT: Eyuboglu et al. 2025, arXiv:2506.06266."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import NotFoundError, UsageError
from pydantic import Field, NonNegativeInt, PositiveInt, PrivateAttr, ValidationInfo, field_validator, model_validator

from edgetune.common.files import expanded

from .common.base import rate_factor
from .common.prompt import CacheMethod, InitializedOptions

if TYPE_CHECKING:
    from edgetune_runtime.engines.base import Tokenizer
    from peft import PeftModel

    from edgetune.objectives.base import Objective
    from edgetune.objectives.example import Example

    from .common.base import TrainedModules


class CartridgeOptions(InitializedOptions):
    """Options of cartridges, named as in PEFT."""

    document: str | None = Field(
        None,
        description="A text file (path relative to the recipe). The adapter learns to answer the rows as the base does"
        " with this text, as much of it as fits, in its context. null: the adapter learns the answers in the rows.",
    )
    num_virtual_tokens: PositiveInt = Field(64, description="Number of virtual tokens, which use up context.")
    num_frozen_tokens: NonNegativeInt = Field(
        1, description="Number of leading virtual tokens that are not trained: they are the attention sink."
    )
    learning_rate_factor: float = rate_factor(10.0)
    document_digest: str | None = Field(None, description="SHA-256 of the document's text; a build fills it in.")

    _tokens: tuple[int, ...] = PrivateAttr(())

    def read(self, text: str, tokens: Sequence[int]) -> CartridgeOptions:
        """The options with the document's tokens; the first of them initialize the cartridge."""
        first = self.init_tokens or tuple(tokens[: self.num_virtual_tokens])
        digest = hashlib.sha256(text.encode()).hexdigest()
        options = self.model_copy(update={"init_tokens": first, "document_digest": digest})
        options._tokens = tuple(tokens)
        return options

    @property
    def document_tokens(self) -> tuple[int, ...]:
        """The document's tokens, after `read`."""
        return self._tokens

    @field_validator("document")
    @classmethod
    def _beside_the_recipe(cls, value: str | None, info: ValidationInfo) -> str | None:
        folder: Path | None = (info.context or {}).get("folder")
        return value if value is None or folder is None else str(folder / expanded(value))

    @model_validator(mode="after")
    def _some_learn(self) -> CartridgeOptions:
        if self.num_frozen_tokens >= self.num_virtual_tokens:
            most = self.num_virtual_tokens - 1
            raise ValueError(f"num_frozen_tokens is {self.num_frozen_tokens}; give at most {most}")
        return self

    @model_validator(mode="after")
    def _begins_with_the_document(self) -> CartridgeOptions:
        if self.document is not None and self.init_text is not None:
            raise ValueError("the document initializes the cartridge; remove init_text, or document")
        return self


class Cartridge(CacheMethod[CartridgeOptions]):
    """A document as a trained prefix: use it when answers need a long text that is too slow to prefill."""

    options = CartridgeOptions
    peft_type = "CARTRIDGE"

    def trained_parameters(self, trained: TrainedModules, options: CartridgeOptions) -> int:
        """The keys and values of the tokens that are not frozen."""
        return (options.num_virtual_tokens - options.num_frozen_tokens) * trained.base.kv_values_per_token

    def check_files(self, options: CartridgeOptions) -> None:
        """Read the document. Raises NotFoundError if it is missing, UsageError if it is empty or not UTF-8."""
        if options.document is not None:
            _text(options.document)

    def prepared(self, options: CartridgeOptions, tokenizer: Tokenizer, rows: Sequence[Example]) -> CartridgeOptions:
        """The options with the document's tokens. Raises what `check_files` raises, and UsageError if it is short."""
        if options.document is None:
            return super().prepared(options, tokenizer, rows)
        text = _text(options.document)
        tokens = tokenizer.tokenize(text)
        if len(tokens) < options.num_virtual_tokens:
            count = options.num_virtual_tokens
            message = f"{options.document} has {len(tokens)} tokens, but num_virtual_tokens is {count}"
            raise UsageError(message, f"set num_virtual_tokens to {len(tokens)} or less")
        return options.read(text, tokens)

    def objective(self, options: CartridgeOptions) -> Objective[Any]:
        """Distillation from the base with the document in its context."""
        if not options.document_tokens:
            return super().objective(options)
        from .common.distill import Distill

        return Distill(options.document_tokens)

    def initialize(self, peft: PeftModel, options: CartridgeOptions) -> None:
        """Initialize from the KV cache of the document's first tokens."""
        self.initialize_from(peft, options.init_tokens, options.num_virtual_tokens)


def _text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"no document {path}", "give the path of a text file, relative to the recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "give a UTF-8 text file") from error
    if not text.strip():
        raise UsageError(f"the document {path} is empty", "give a file with the text to learn, or remove document")
    return text


METHOD = Cartridge()
