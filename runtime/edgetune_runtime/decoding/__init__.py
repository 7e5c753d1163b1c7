<<<<<<< HEAD
"""Which tokens an answer may have, and several of them in one step."""
=======
"""Constrained decoding: what an answer may be, and which tokens may come next."""
>>>>>>> h-grammar
