"""Experiments on real photographs: hours, not seconds, and not part of `pytest`."""
