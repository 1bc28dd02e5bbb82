"""The directory of a run, and what is kept in it: whole files, checkpoints, one process at a time."""
