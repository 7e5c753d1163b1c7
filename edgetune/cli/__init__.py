"""The command line: one file per command group; data on standard output, progress on standard error.

Commands import what they need when they run, so that help and `edgetune plan` do not wait for torch.
"""
