"""Child processes with limits, and the limits that a process sets itself."""
