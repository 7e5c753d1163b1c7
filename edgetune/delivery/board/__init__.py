"""The program that a kit brings to the board: checks the board, installs versions and switches between them.

Standard library only, apart from the modules of the runtime that `edgetune.delivery.kit.program` packs with it.
"""
