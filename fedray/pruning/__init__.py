"""WHAT TO REMOVE: masks, scores, schedules and channels, as pure functions of weights and masks."""
