"""Benchmarks of one vector for each image: nearest neighbours, linear probes, zero-shot."""
