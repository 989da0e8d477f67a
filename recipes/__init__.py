"""Built-in recipes: one YAML file per decoder and its training settings, used by `train-decoder --recipe NAME`."""
