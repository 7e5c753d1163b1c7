"""Output constraints, drafts, and log-probabilities of answers."""
