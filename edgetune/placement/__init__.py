"""Which modules an adapter tunes, chosen by what they gain and what they cost on the board."""
