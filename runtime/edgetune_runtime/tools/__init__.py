"""Tools: their definitions, the chat template's format of calls, and the calls of an answer."""
