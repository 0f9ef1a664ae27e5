"""Image data: shards, their index, the training stream and labelled datasets."""
