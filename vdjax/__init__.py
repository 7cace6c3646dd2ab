"""vdjax traces how a language model's values drift during post-training."""

import gc

gc.set_threshold(50_000)  # imports and tracing make many objects, little garbage: a tenth of the imports' time

__version__ = "0.1.0"
