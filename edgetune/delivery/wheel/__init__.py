"""A wheel of llama-cpp-python for boards: built on the host, with code for every processor of its platform."""
