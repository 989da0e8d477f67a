"""Download of datasets by name."""
