"""Answers for voice assistants, over the Wyoming protocol."""
