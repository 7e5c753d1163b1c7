"""Tasks and their data: rows, splits, tokenized examples, and the metrics of answers."""
