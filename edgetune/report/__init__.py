"""A bundle in; a page about how it was trained, checked and fits on boards out, and a model card."""
