"""Runs at hand: lists, comparisons, live tables, and their end. Needs neither torch nor Ray."""
