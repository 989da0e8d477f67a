"""Captions files and image folders as lists of images with captions. One module per format."""
