"""`task: text-classification`: one encoder, and an adapter with a head for each task's labels."""
