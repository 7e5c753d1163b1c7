"""What the runtime reads of genai_config.json, which onnxruntime-genai's builder writes beside a graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import NotFoundError, VerificationError
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN


@dataclass(frozen=True)
class OnnxConfig:
    """What genai_config.json tells about the model."""

    context_length: int
    head_size: int
    end_tokens: tuple[int, ...]


def read_config(path: Path) -> OnnxConfig:
    """Read the file; NotFoundError when it is missing, VerificationError when it is not what the builder writes."""
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        ends = model["eos_token_id"]
        end_tokens = tuple(int(token) for token in (ends if isinstance(ends, list) else [ends]))
        return OnnxConfig(int(model["context_length"]), int(model["decoder"]["head_size"]), end_tokens)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing", COPY_BUNDLE_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{path} is not what onnxruntime-genai's builder writes: {error}", "build it again"
        ) from error
