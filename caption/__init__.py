"""Captioning of new images with an encoder and a trained decoder."""
