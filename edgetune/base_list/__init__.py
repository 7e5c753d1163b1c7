"""Facts about bases: architectures with their formats and methods, and published weights."""
