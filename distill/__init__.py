"""What runs: recipes, the objective, the engine, the training loop and the commands."""
