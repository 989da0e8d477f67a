"""Captioning of new images: an encoder and a decoder combined."""
