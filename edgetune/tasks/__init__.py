"""Tasks and their data: rows, splits, tokenized examples, metrics, and the scores of a bundle's answers."""
