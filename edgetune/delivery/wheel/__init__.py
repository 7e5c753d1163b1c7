"""A wheel of llama-cpp-python for boards: built on the host, with code for every processor of its platform."""

from .build import llama_wheel
from .platforms import PLATFORMS, Platform

__all__ = ["PLATFORMS", "Platform", "llama_wheel"]
