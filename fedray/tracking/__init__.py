"""Runs as MLflow and other trackers see them."""
