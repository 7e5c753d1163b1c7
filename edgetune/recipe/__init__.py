"""The recipe: its model, its error messages and the reference generated from it."""
