"""Training objectives: examples, batches and losses."""
