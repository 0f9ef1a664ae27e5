"""Errors, recipe files, processes and ranks, run folders, checkpoints and tracking."""
