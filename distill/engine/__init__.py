"""The engine (DeepSpeed), the optimizer, the learning rate and the average of the weights."""
