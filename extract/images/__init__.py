"""Image decoding on the CPU and the GPU."""
