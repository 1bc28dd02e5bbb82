"""Seconds of a round and memory beside other platforms: Flower, pfl-research, fluke, a plain loop, fedray.

    python -m benchmarks.peers [--models mlp cnn resnet18] [--frameworks flower pfl …] [--rounds N]
                               [--warm-up N] [--environments FOLDER]

Each peer has a virtual environment with pinned versions, which the first call installs from the package
index; its process stays alive and makes a round when it is asked. All get the same data, clients and first
weights. First each trains for some rounds on digits: whoever does not reach the plain loop's accuracy, or
whose clients see another number of examples, is shown as failed and not timed. Then the rounds alternate.
Memory is the proportional set size of the process tree. One torch thread per process.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.peers import environments, table
from benchmarks.peers.frameworks import FLOWER, FRAMEWORKS, PLAIN, Framework
from benchmarks.peers.measuring import Row, check, judge, time_rounds
from benchmarks.peers.session import Session
from benchmarks.peers.workloads import TOLERANCE, WORKLOADS, examples_of, task_of


class Starter:
    """Starts frameworks on a federation, and keeps their logs.

    Args:
        model: name of the model.
        checking: whether it is the short training for the accuracy.
        folder: for the federation and the logs.
        environments: holds the environments.
    """

    def __init__(self, model: str, checking: bool, folder: Path, environments: Path) -> None:
        self.environments = environments
        self.folder = folder / (f"{model}-check" if checking else model)
        self.folder.mkdir()
        task = task_of(model, checking)
        task.save(self.folder)
        self.examples = examples_of(task)
        self.about = (
            f"{task.cohort} of {len(task.clients):,} clients, batches of {task.batch}, "
            f"images of {'×'.join(map(str, task.x.shape[1:]))}"
        )

    def __call__(self, framework: Framework) -> Session:
        """Start a framework."""
        log = self.folder / f"{framework.title.replace(' ', '_')}.log"
        return Session(framework.command(self.folder, self.environments), log, framework.environ)


def measure(model: str, names: list[str], arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Check, time and print the frameworks with a model; return their rows."""
    workload = WORKLOADS[model]
    rows = {name: Row(FRAMEWORKS[name].title) for name in names}
    start = Starter(model, True, folder, arguments.environments)
    for name, row in rows.items():
        check(row, partial(start, FRAMEWORKS[name]), workload.check_rounds, start.examples)
        print(f"  {model}, {row.title}: {row.refused or f'accuracy {row.accuracy:.3f}'}", flush=True)
    judge(rows.values(), rows[PLAIN], TOLERANCE)
    start = Starter(model, False, folder, arguments.environments)
    rounds = workload.rounds if arguments.rounds is None else arguments.rounds
    warm_up = workload.warm_up if arguments.warm_up is None else arguments.warm_up
    time_rounds(rows, lambda name: start(FRAMEWORKS[name]), warm_up, rounds, start.examples)
    print(
        f"\n{model}: {start.about}; alternating, medians of {rounds} rounds after {warm_up}; "
        f"accuracy on digits after {workload.check_rounds} rounds"
    )
    print("\n".join(table.lines(rows.values(), rows.get(FLOWER), rows[PLAIN])), flush=True)
    return list(rows.values())


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument(
        "--frameworks",
        nargs="+",
        default=list(FRAMEWORKS),
        choices=list(FRAMEWORKS),
        help="the plain loop always runs: it is the reference",
    )
    parser.add_argument("--rounds", type=int, help="rounds to time; 15, 5 and 3 by default")
    parser.add_argument("--warm-up", type=int, help="rounds before them; 4, 2 and 1 by default")
    parser.add_argument(
        "--environments",
        type=Path,
        default=environments.cache(),
        help=f"folder of the virtual environments; {environments.cache()} by default",
    )
    arguments = parser.parse_args()
    names = [name for name in FRAMEWORKS if name in {*arguments.frameworks, PLAIN}]
    found: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="peers") as folder:
        for model in arguments.models:
            for row in measure(model, names, arguments, Path(folder)):
                if row.versions:
                    found[row.title] = row
    print("\n" + "\n".join([table.processor(), *table.versions(found.values())]))


if __name__ == "__main__":
    main()
