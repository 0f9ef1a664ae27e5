"""Detection: a small detector on a frozen feature map, and its average precision."""
