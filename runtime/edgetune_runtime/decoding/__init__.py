"""Several tokens per step, and which tokens an answer may have."""
