"""Continued pretraining of a base on texts of a domain."""
