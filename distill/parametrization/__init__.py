"""How weights are trained: spectral norms, noise, LoRA, freezing."""
