"""Caption decoders, one module per family; `base.py` defines the contract."""
