"""What a training learns: examples, their batches and the loss."""
