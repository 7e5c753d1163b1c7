"""The router of a bundle, which chooses the adapter for a prompt."""
