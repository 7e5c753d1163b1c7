"""Delivery of bundles to boards: wheels, offline kits, deploys, and the program that installs them on the board."""
