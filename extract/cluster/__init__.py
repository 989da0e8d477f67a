"""Work sharing across processes, GPUs, and cluster jobs."""
