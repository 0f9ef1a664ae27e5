"""Detection: a small detector trained on a frozen map, and its average precision."""
