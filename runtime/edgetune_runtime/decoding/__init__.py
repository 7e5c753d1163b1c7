"""Which tokens an answer may have, and several of them in one step."""
