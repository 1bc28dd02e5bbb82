"""What a user asks for: the config of a run, its keys, and what is wrong with them."""
