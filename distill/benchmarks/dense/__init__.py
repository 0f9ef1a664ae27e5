"""Dense benchmarks: segmentation, depth, surface normals, and several tasks at once."""
