"""The shapes that trained adapters are folded into."""
