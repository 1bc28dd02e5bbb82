"""Tables and figures from the files of runs. Needs neither torch nor Ray."""

from fedray.report.reading import RunData, find_runs, load_run
from fedray.report.series import label_runs, settings
from fedray.report.table import Report, comparison, render_table, write_report

__all__ = [
    "Report",
    "RunData",
    "comparison",
    "find_runs",
    "label_runs",
    "load_run",
    "render_table",
    "settings",
    "write_report",
]
