"""Forms of files: each makes random edits, which are JSON lists, and applies edits to the bytes of a valid file.

An edit names what it changes (a key, a tensor, a field), so it also applies to another valid file of the same form.
"""
