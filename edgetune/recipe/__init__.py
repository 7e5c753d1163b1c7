"""Recipes: what a build is told, checked before any work, and the reference made from it."""
