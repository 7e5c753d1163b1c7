"""The machine's cores and memory, the number of compute threads, and their priority."""
