"""FRLP's rate search as a problem for RLlib."""
