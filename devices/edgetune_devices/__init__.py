"""Boards, and what fits on them."""
