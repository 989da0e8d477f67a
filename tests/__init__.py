"""Tests, and the fault injection of `make torture`."""
