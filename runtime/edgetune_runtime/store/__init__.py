"""The store of versions on a device, which kits, deploys and updates share: files by digest, and one `current` version.

Standard library only, apart from modules of the runtime that are so too.
"""
