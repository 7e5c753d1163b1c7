"""Export, parity check, manifest and packing."""
