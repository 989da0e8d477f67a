"""Layers that several decoders share."""
