"""The directory of a run on disk: whole files, checkpoints, one process at a time."""
