"""Publishes bundles in signed repositories of static files."""
