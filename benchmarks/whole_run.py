"""Seconds of a whole run or sweep from cold: where they go, and how they compare with another checkout.

    python -m benchmarks.whole_run [CONFIG] [KEY=VALUE …] [--times 3] [--sweep] [--against CHECKOUT]

Each time is that of one command (`fedray run`, or `fedray sweep`) in a new process and an empty directory,
with its own MLflow store. With `--against`, the commands of the two checkouts alternate. The shares are those
of a run, each without the parts inside it:

    import       Python and the modules of fedray
    data         load and partition the data, build the model, count its FLOPs
    Ray          start it, and wait for the client actors
    store        MLflow: import it, open the store, deliver the end of the run
    training     rounds, without their evaluation
    evaluation   validation data, test set, clients' own examples
    files        checkpoints, rounds, model, result
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
QUICKSTART = HERE / "tune_configs" / "quickstart.yaml"
COMMAND = "from fedray.cli import main; main()"
PARTS = ("import", "data", "Ray", "store", "training", "evaluation", "files")


class Shares:
    """Seconds by part; a part that starts within another one stops the clock of the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count the time inside to a part."""
        self._switch()
        self._open.append(part)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count the time of a function to a part."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        setattr(owner, name, staticmethod(watched) if name == "of" else watched)


def inside(config: str, changes: list[str], started: float) -> None:
    """Run a config in this process, `started` by the clock; print the seconds of its parts as JSON."""
    shares = Shares()
    shares.seconds["import"] = time.time() - started
    with shares.within("import"):
        from fedray.cli import collect_rarely

        collect_rarely()
        from fedray.config.run_config import RunConfig
        from fedray.experiment import run as runs
        from fedray.federation.crew import Crew
        from fedray.federation.pool import RayPool
        from fedray.federation.server import Server
        from fedray.storage.run_files import RunFiles

    shares.watch(runs.Federation, "of", "data")
    shares.watch(runs, "placed", "Ray")
    shares.watch(runs, "import_mlflow", "store")
    shares.watch(RayPool, "__init__", "Ray")
    shares.watch(Crew, "assemble", "Ray")
    for name in ("open_tracker", "close_tracker"):
        shares.watch(runs, name, "store")
    for name in ("setup", "step"):
        shares.watch(Server, name, "training")
    shares.watch(Server, "evaluate", "evaluation")
    for name in ("append", "save", "write_model", "write_json", "write_client_accuracy"):
        shares.watch(RunFiles, name, "files")
    runs.run(RunConfig.load(config, changes), out="run")
    print(json.dumps(shares.seconds))


def timed(command: list[str], checkout: Path) -> tuple[float, str]:
    """Run a command on a checkout in an empty directory; return seconds and output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(checkout)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return seconds, done.stdout


def print_shares(config: str, changes: list[str], times: int) -> None:
    """Print the parts of a run: medians of several runs, after one that fills the caches."""
    command = [sys.executable, "-m", "benchmarks.whole_run", config, *changes, "--inside"]
    found: list[dict[str, float]] = []
    for _ in range(times + 1):
        seconds, output = timed([*command, str(time.time())], HERE)
        found.append(json.loads(output.splitlines()[-1]) | {"in all": seconds})
    medians = {part: statistics.median(one[part] for one in found[1:]) for part in (*PARTS, "in all")}
    medians["rest"] = medians["in all"] - sum(medians[part] for part in PARTS)
    print(f"\none run, medians of {times}\n{'':14}{'seconds':>9}{'share':>8}")
    for part in (*PARTS, "rest", "in all"):
        print(f"{part:14}{medians[part]:9.2f}{medians[part] / medians['in all']:8.0%}")


def print_comparison(verb: str, config: str, changes: list[str], checkouts: list[Path], times: int) -> None:
    """Print the seconds of a command for each checkout, and how many times faster this one is."""
    command = [sys.executable, "-c", COMMAND, verb, config, *changes]
    seconds: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
    for number in range(times + 1):
        for checkout in checkouts:
            took, _ = timed(command, checkout)
            if number:  # the first one fills the caches
                seconds[checkout].append(took)
    ours = statistics.median(seconds[HERE])
    print(f"\nfedray {verb}, alternating, medians of {times}\n{'':14}{'seconds':>9}{'min … max':>18}{'×':>7}")
    for checkout, times_of in seconds.items():
        spread = f"{min(times_of):.1f} … {max(times_of):.1f}"
        name = "this checkout" if checkout == HERE else "the other one"
        median = statistics.median(times_of)
        print(f"{name:14}{median:9.1f}{spread:>18}{median / ours:7.2f}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default=str(QUICKSTART))
    parser.add_argument("changes", nargs="*", help="KEY=VALUE")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="time `fedray sweep`")
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = str(Path(arguments.config).resolve())
    if arguments.inside:
        inside(config, arguments.changes, arguments.inside)
        return
    verb = "sweep" if arguments.sweep else "run"
    checkouts = [HERE] + ([arguments.against.resolve()] if arguments.against else [])
    print_comparison(verb, config, arguments.changes, checkouts, arguments.times)
    if not arguments.sweep:
        print_shares(config, arguments.changes, arguments.times)


if __name__ == "__main__":
    main()
