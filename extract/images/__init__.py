"""Decoding of image batches, on the CPU and the GPU."""
