"""Benchmarks that match points between two images."""
