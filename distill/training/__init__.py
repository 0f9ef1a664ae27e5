"""The training loop, the session around it, arms and resolutions."""
