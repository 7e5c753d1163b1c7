"""Text generation with decoders."""

from .base import TaskType

TASK_TYPE = TaskType()
