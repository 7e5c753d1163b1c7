"""Keys and values that were computed once and are used again."""
