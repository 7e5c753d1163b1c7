"""Text generation with decoders."""

from .base import TaskType

TASK_TYPE = TaskType(
    # Requests to the server may ask for JSON or tools, also if no adapter has an output constraint.
    runtime_extras=("structured",),
)
