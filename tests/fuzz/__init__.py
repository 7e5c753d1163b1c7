"""Mutations of each kind of file that the runtime or the host reads, for `make fuzz` and tests/corpus."""
