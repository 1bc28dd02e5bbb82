"""Damaged and hostile inputs: `python -m benchmarks.fuzz --inputs 1000000 --seed 0`."""
