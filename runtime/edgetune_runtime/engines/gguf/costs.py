"""What a step of several tokens costs in llama.cpp, in single-token steps; see `Engine`."""

from __future__ import annotations

BATCH_COST = {2: 1.6, 3: 2.1, 4: 2.3, 5: 3.0, 6: 3.4, 7: 3.8, 8: 3.5, 12: 4.8, 16: 5.4}
# Measured on SmolLM2-135M and Gemma 3 270M, whose vocabulary has more than half of the parameters.
LOGITS_COST = {2: 2.2, 3: 2.8, 4: 3.3, 6: 5.3, 8: 3.9, 12: 4.4, 16: 5.0}
