"""Output constraints of tasks: given by the recipe, or inferred from the rows."""
