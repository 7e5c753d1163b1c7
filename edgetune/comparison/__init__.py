"""`edgetune compare`: trains, exports and measures several methods on one task."""
