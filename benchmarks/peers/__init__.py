"""fedray beside other platforms: `python -m benchmarks.peers`."""
