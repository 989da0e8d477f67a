"""What both stages agree on. Loads without torch."""
