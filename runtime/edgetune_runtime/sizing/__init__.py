"""The memory that a bundle needs and the speed to expect, for `doctor` on a board and `devices fit` on the host."""
