"""Datasets as examples, examples as tokens, tokens as packed batches."""
