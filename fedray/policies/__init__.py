"""Policies: they decide how much to prune."""
