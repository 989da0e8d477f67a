"""The decoders, one file a family; `base.py` holds the contract."""
