"""What gets a bundle onto a board: llama.cpp's wheel for its processor."""
