"""The memory that a bundle needs and its speed: predicted, for `doctor` and `devices fit`, and measured by `bench`."""
