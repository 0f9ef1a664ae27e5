"""Labelled data sets: readers of images with ground truth, for the layouts of published sets."""
