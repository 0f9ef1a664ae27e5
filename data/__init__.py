"""Images and where they come from: shards, their index, the training stream; knows no model."""
