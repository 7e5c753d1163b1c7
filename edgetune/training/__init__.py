"""The training loop, its schedule, and the memory, threads and layers that it uses."""
