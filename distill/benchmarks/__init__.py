"""Benchmarks: an encoder and a dataset in, metrics out. They know no recipe or run."""
