"""Decoding methods: greedy and beam search, sampling, and MBR reranking."""
