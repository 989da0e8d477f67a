"""The two stages joined: a photo in, a sentence out."""
