"""Probe sets, readouts and the vmapped evaluator."""
