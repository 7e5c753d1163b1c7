"""Installs a bundle on boards over ssh."""
