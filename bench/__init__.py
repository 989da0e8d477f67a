"""Benchmarks behind the numbers in the documentation."""
