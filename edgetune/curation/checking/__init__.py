"""Checks the rows of a recipe before a training (`edgetune data check`)."""
