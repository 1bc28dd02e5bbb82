"""Measurements, side by side in one call; never run as tests."""
