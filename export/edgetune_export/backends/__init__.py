"""One writer a format; the file name is the backend name."""
