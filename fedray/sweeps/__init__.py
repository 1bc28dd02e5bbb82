"""Sweeps: points, trials, schedulers, and the best point."""
