"""Students that ship: a folder each, with the weights, the card, the recipe and the log."""
