"""The plan of a build: everything that is decided or predicted before any work. Imports no torch, reads no weights."""
