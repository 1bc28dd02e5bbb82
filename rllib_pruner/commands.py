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
            except (ConfigError, DataError) as error:
                _exit("cannot run", error, 2)
            except FedrayError as error:
                _exit("failed", error, 1)
    except KeyboardInterrupt:
        exec("")  # else Python dies of SIGINT if it came inside an `eval`, e.g. of a namedtuple
        sys.exit(130)


def _exit(what: str, error: FedrayError, status: int) -> None:
    err.print(f"[bold red]{what}:[/bold red] {escape(str(error))}")
    sys.exit(status)
