"""Import of features that other programs wrote."""
