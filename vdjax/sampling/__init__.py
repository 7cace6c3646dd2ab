"""Sampling responses from a model: `generate` on the host, `decode.decode` the pure program under it."""

from vdjax.sampling.decode import Samples
from vdjax.sampling.generate import Sampling, generate

__all__ = ["Samples", "Sampling", "generate"]
