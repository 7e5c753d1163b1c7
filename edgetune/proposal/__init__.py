"""Proposes a recipe for a user's data files, with the reason for each setting: `edgetune init --data`."""
