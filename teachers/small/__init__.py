"""Weights, cards and upsamplers of two small teachers; tests/quality/small_teachers trains them."""
