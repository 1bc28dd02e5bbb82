"""The stage process as a problem for RLlib."""
