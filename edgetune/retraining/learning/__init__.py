"""Trains adapters again with the corrections in a log of answers, and keeps them if they got no worse."""
