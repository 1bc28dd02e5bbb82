"""Policies: who decides how much to prune."""
