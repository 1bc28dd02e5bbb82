"""Directories of runs and sweeps in an object store: published from one node, fetched on any other."""
