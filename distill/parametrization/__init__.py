"""How weights are held while they train: spectral norms, noise, low rank, freezing."""
