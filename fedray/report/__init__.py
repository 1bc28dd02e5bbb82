"""How runs are seen: tables and figures from the files of runs. Needs neither torch nor Ray."""
