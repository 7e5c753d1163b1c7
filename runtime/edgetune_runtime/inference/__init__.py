"""The public API for inference and its implementation: runtimes, sessions, streams, and how a bundle is opened."""
