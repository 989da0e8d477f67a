"""What Gridcap survives: kills, flipped bits, broken images and captions. Run by `make torture`."""
