"""Tokenizer, vocabulary, epoch order, and the stream of training batches."""
