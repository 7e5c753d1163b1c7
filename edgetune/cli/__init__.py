"""The command line: one file per command group; data on standard output, progress on standard error."""
