"""Benchmarks: they take an encoder and a data set, and return metrics."""
