"""What is known about the architectures of bases."""
