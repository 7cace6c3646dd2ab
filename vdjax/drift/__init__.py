"""Drift of values over a run: metrics, statistics, figures, TensorBoard and one HTML report."""
