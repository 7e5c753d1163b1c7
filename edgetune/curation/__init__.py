"""Works on the rows of a user before a training: checks those that there are, and makes new ones."""
