"""Demo: the whole pipeline, run through its commands, on a small dataset of rendered scenes."""
