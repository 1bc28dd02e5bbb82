"""How runs are made, kept and seen."""
