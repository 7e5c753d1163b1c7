"""edgetune: one small adapter per task on one quantized base, from a recipe to a bundle."""
