"""Tables and figures from the files of runs. Needs neither torch nor Ray."""
