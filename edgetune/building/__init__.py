"""Builds a bundle: prepares base and training jobs, trains, exports; one builder per task."""
