"""Formats of captions files. Each module defines one format, `FORMAT`; a new module is a new format."""
