"""Chooses the modules that an adapter tunes, by validation loss and by decode overhead on the board."""
