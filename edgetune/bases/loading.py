"""Loads a base in torch, with the dequantized weights of the file that ships."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.wording import first_line, first_of

from .making import Base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_torch(base: Base, dtype: torch.dtype, *, mapped: Path | None = None) -> PreTrainedModel:
    """The base as a transformers model on the CPU, with the dequantized weights of the file that ships.

    With `mapped`, float32 weights are written to that file and mapped from it; see `weights.model_of`.
    """
    from transformers.utils import logging  # noqa: PLC0415 - torch only when training

    from .weights import config_of, model_of, unread_tensors  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # transformers draws its own progress bar, even on a pipe.
        with redirect_stderr(io.StringIO()):
            config = config_of(base.header)
            # PEFT writes this into the files that it saves.
            config.name_or_path = str(base.path.parent)
            model = model_of(config, dtype, base.path, base.header, mapped)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        message = f"transformers cannot load base {base.name!r}: {first_line(error)}"
        raise IncompatibleError(message, "use a base with another quantization or architecture") from error
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if missing:
        message = f"base {base.name!r} has no weights for {first_of(missing, 1)}"
        raise IncompatibleError(message, "convert the base again with llama.cpp's converter")
    if unread := unread_tensors(model, base.header):
        message = f"base {base.name!r} has {first_of(unread, 1)}, which its model in transformers lacks"
        raise IncompatibleError(message, "use another base of this architecture")
    model.config.use_cache = False
    return model
