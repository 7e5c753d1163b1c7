"""Mutations of each kind of file that the runtime or the host reads: `make fuzz`, and the corpus that `make test` reads."""
