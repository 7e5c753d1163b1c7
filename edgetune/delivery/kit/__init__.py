"""Offline kits: a bundle, the runtime's wheels for a board, and the program that installs both."""
