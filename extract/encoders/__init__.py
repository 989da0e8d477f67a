"""Frozen image encoders: specifications, weights, and `GridEncoder`."""
