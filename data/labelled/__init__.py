"""Images with ground truth, read from the layouts that users have on disk. Knows no model."""
