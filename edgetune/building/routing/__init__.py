"""Makes the router of a bundle from the prompts of its tasks."""
