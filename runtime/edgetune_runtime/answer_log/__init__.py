"""The log of answers and their corrections, and what it leaves out."""
