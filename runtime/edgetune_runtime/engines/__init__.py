"""One engine a format; the file name is the engine name."""
