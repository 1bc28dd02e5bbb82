"""The config of a run: its keys, how they are read, changed and checked, and the messages about them."""
