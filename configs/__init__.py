"""Experiments, one a file; `base` is what those of the paper share."""
