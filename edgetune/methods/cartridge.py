"""Cartridges, through PEFT: Eyuboglu et al. 2025, arXiv:2506.06266."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import NotFoundError, UsageError
from pydantic import Field, NonNegativeInt, PositiveInt, PrivateAttr, ValidationInfo, field_validator, model_validator

from edgetune.methods.common.base import rate_factor

from .common.prompt import BeginOptions, CacheMethod

if TYPE_CHECKING:
    from edgetune_runtime.engines.base import Tokenizer
    from peft import CartridgeConfig, PeftModel
    from transformers import PreTrainedModel

    from edgetune.objectives.base import Objective
    from edgetune.objectives.example import Example


class CartridgeOptions(BeginOptions):
    """Options of cartridges, by PEFT's names."""

    document: str | None = Field(
        None,
        description="A text file, relative to the recipe: the adapter learns to answer the rows as the base does with"
        " that text in its context, as much of it as fits; without one, it learns the rows' own answers.",
    )
    num_virtual_tokens: PositiveInt = Field(64, description="Positions of the context that the adapter takes.")
    num_frozen_tokens: NonNegativeInt = Field(
        1, description="The first so many stay as they begin, as all other tokens lean on them."
    )
    learning_rate_factor: float = rate_factor(10.0)
    document_digest: str | None = Field(None, description="SHA-256 of the document's text; a build fills it in.")

    _tokens: tuple[int, ...] = PrivateAttr(())

    def read(self, text: str, tokens: Sequence[int]) -> CartridgeOptions:
        """The same with the document's text in tokens, the first of which the cartridge begins as."""
        first = self.init_tokens or tuple(tokens[: self.num_virtual_tokens])
        digest = hashlib.sha256(text.encode()).hexdigest()
        options = self.model_copy(update={"init_tokens": first, "document_digest": digest})
        options._tokens = tuple(tokens)
        return options

    @property
    def document_tokens(self) -> tuple[int, ...]:
        """The document in tokens of the base, once `read` has it."""
        return self._tokens

    @field_validator("document")
    @classmethod
    def _beside_the_recipe(cls, value: str | None, info: ValidationInfo) -> str | None:
        folder: Path | None = (info.context or {}).get("folder")
        return value if value is None or folder is None else str(folder / Path(value).expanduser())

    @model_validator(mode="after")
    def _some_learn(self) -> CartridgeOptions:
        if self.num_frozen_tokens >= self.num_virtual_tokens:
            raise ValueError(f"num_frozen_tokens must be less than num_virtual_tokens, {self.num_virtual_tokens}")
        return self


class Cartridge(CacheMethod[CartridgeOptions]):
    """A document as a prefix: take it where a long text is to be known without the cost of reading it."""

    options = CartridgeOptions
    peft_type = "CARTRIDGE"

    def config(self, base: PreTrainedModel, options: CartridgeOptions) -> CartridgeConfig:
        """PEFT's configuration."""
        from peft import CartridgeConfig  # noqa: PLC0415 - torch only when training

        return CartridgeConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=options.num_virtual_tokens,
            num_frozen_tokens=options.num_frozen_tokens,
        )

    def prepared(self, options: CartridgeOptions, tokenizer: Tokenizer, rows: Sequence[Example]) -> CartridgeOptions:
        """With the document's tokens. NotFoundError or UsageError when it cannot be read or is too short."""
        if options.document is None:
            return super().prepared(options, tokenizer, rows)
        text = _text(options.document)
        tokens = tokenizer.tokenize(text)
        if len(tokens) < options.num_virtual_tokens:
            message = f"{options.document} has {len(tokens)} tokens for {options.num_virtual_tokens} virtual ones"
            raise UsageError(message, f"give num_virtual_tokens: {len(tokens)} or less")
        return options.read(text, tokens)

    def objective(self, options: CartridgeOptions) -> Objective[Any]:
        """The base with the document in its context is the teacher."""
        if not options.document_tokens:
            return super().objective(options)
        from edgetune.methods.common.distill import Distill  # noqa: PLC0415 - torch only when training

        return Distill(options.document_tokens)

    def begin(self, peft: PeftModel, options: CartridgeOptions) -> None:
        """Begin as the states of the document's first tokens."""
        self.begin_as(peft, options.init_tokens, options.num_virtual_tokens)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"no document {path}", "give a text file, relative to the recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "give a text file in UTF-8") from error


METHOD = Cartridge()
