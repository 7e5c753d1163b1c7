"""The machine's cores and memory, and how many threads compute."""
