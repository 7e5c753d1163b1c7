"""What methods share; no method of its own."""
