"""The `fedray` command; also `python -m fedray`."""

import signal


def main() -> None:
    """Run the command line; Ctrl-C while it is being imported ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fedray.cli import main as run

    run()


if __name__ == "__main__":
    main()
