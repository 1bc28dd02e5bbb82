"""The command line: `fedray run | sweep | report | results | verify | resume | sync | ui | agent | …`.

Exit status: 0 done, 1 failed while running, 2 refused before anything started, 130 interrupted, 143 and 129
ended by SIGTERM and SIGHUP.

A file holds a group of commands. A command imports what it needs when it runs: `fedray --help` does not wait
for torch.
"""

# `--help` lists them in this order
from fedray.cli import new, planning, running, hand, watching, reports, results, tables, agents  # isort: skip
from fedray.cli.agents import AGENT_COMMANDS
from fedray.cli.completion import LISTING
from fedray.cli.console import err, out
from fedray.cli.entry import app, collect_rarely, main
from fedray.cli.tables import listing
from fedray.experiment.progress import LINES

__all__ = [
    "AGENT_COMMANDS",
    "LINES",
    "LISTING",
    "agents",
    "app",
    "collect_rarely",
    "err",
    "hand",
    "listing",
    "main",
    "new",
    "out",
    "planning",
    "reports",
    "results",
    "running",
    "tables",
    "watching",
]
