"""The recipe: its model, the facts of tasks and formats that it needs, its error messages and its reference."""
