"""Training objectives: cross-entropy and SCST."""
