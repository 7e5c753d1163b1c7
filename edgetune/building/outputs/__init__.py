"""What the answers of a task may be: given by the recipe, or inferred from its training rows."""
