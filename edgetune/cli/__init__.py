"""The command line: one file a command group; data on standard output, progress on standard error."""
