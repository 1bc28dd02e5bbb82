"""fedray."""
