"""Tokenizer, vocabulary, epoch order, and batch stream."""
