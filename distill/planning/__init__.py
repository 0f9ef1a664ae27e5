"""What a recipe will cost, counted without weights, images or a GPU."""
