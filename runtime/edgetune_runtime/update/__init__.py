"""Updates of a device from a signed repository, over HTTP or from a folder."""
