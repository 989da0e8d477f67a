"""The demo: the whole pipeline on a small data set of rendered scenes, by the same commands a user types."""
