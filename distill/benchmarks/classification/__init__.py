"""Benchmarks of one vector an image: nearest neighbours, linear probes, zero-shot."""
