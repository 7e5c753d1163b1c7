"""The training loop, its schedule, memory planning, thread control and fused layers."""
