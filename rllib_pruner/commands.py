"""Errors of a command as a message and an exit status, for `fedray` and for `python -m rllib_pruner.…`."""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from fedray.errors import ConfigError, DataError, FedrayError
from fedray.experiment.interrupt import signals

err = Console(stderr=True, soft_wrap=True, highlight=False)  # a wrapped path cannot be copied


def run_app(app: Callable[[], object]) -> None:
    """Run a command line; exit with 2 if it cannot run as asked, with 1 if it failed on the way.

    SIGINT ends it with 130, SIGTERM with 143, SIGHUP with 129, whatever it does at that moment, also
    while the interpreter ends.
    """
    try:
        with signals(is_command=True) as stop, stop.cuts():
            try:
                app()
            except FedrayError as error:
                if stop.signal is None:  # else the signal explains it
                    _exit(error)
                raise
    except KeyboardInterrupt:
        exec("")  # else Python dies of SIGINT if it came inside an `eval`, e.g. of a namedtuple
        sys.exit(130)


def _exit(error: FedrayError) -> None:
    cannot_run = isinstance(error, ConfigError | DataError)
    what = "cannot run" if cannot_run else "failed"
    err.print(f"[bold red]{what}:[/bold red] {escape(str(error))}")
    sys.exit(2 if cannot_run else 1)
