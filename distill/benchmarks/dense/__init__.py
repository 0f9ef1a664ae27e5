"""Benchmarks of a value for each pixel: segmentation, depth, normals, several at once."""
