"""Recipes: a decoder and how it is trained, one YAML file each; `train-decoder --recipe NAME` takes one."""
