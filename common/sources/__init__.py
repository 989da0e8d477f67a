"""Image sources: folders, lists, archives, and object storage. See `registry.open_source`."""
