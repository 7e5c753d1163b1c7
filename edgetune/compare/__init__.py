"""Recipe and a list of methods in, a measured comparison out: what `edgetune compare` does."""
