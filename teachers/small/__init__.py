"""Weights, cards and upsamplers of small teachers; tests/quality/small_teachers trains two."""
