"""Tokenizers: caption <-> units (words, characters, or subwords)."""
