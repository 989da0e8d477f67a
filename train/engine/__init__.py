"""Training engine: loop, step, optimizer, distributed training, checkpoints, and logging."""
