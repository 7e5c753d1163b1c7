"""What a method trained in, plain GGUF files and a bundle out."""
