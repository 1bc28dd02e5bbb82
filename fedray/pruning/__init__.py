"""What to remove: pure functions of weights and masks, and who decides how much."""
