"""Greedy search, beam search, sampling, and MBR reranking."""
