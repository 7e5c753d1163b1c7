"""What every package here may use, and what knows of none of them: progress, failures, processes, folders, pages."""
