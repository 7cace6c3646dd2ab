"""vdjax traces how a language model's values drift during post-training."""

import gc

gc.set_threshold(50_000)  # a fifth of the imports' time: they and tracing make many objects, little garbage

__version__ = "0.1.0"
