"""edgetune: one small adapter a task on one quantized base, from a recipe to a bundle."""
