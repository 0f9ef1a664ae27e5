"""Experiments on real photographs, which take hours and are not part of `pytest`."""
