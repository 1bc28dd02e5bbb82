"""Searchers against a grid at equal compute: hypervolume over trials.

    python -m benchmarks.search data.root=PATH_OF_FASHION_MNIST      run, or continue, and print
    python -m benchmarks.search --read                               print what is there

Each search tries 40 points of `tune_configs/pareto.yaml`, all of the same rounds, with three seeds: the seed
is that of the runs and of the searcher, and shuffles the order of the grid's points. A point counts by
validation accuracy and by bytes sent up. The hypervolume is the area between the points and the reference
(accuracy 0.5, and the bytes of a dense run), as a share of that of a perfect model that sends nothing. All
runs are made in this process; a search that was interrupted continues, by the same `points.jsonl` as a sweep.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fedray.config.messages import shortened
from fedray.config.tune_config import tune_config
from fedray.experiment.run import resume, run
from fedray.report.table import mean_and_interval
from fedray.storage.run_files import RunFiles
from fedray.sweeps.outcome import status_of
from fedray.sweeps.pareto import hypervolume
from fedray.sweeps.searchers import proposer
from fedray.sweeps.space import Sweep
from fedray.sweeps.suggesting import Suggestions, drawn

FILE = Path("tune_configs/pareto.yaml")
SEEDS = (0, 1, 2)
SHOWN = (10, 20, 30, 40)
GRID: dict[str, list[Any]] = {
    "method.threshold": [0.0, 0.3, 0.6, 0.9, 1.2],
    "method.initial_density": [0.05, 0.136, 0.368, 1.0],
    "method.stages": [2, 5],
}
"""40 points over the same ranges: the densities are a geometric series."""
SEARCHES: dict[str, list[str]] = {
    "nsga2": [],
    "tpe": ["tune.search={name: optuna, sampler: tpe}"],
    "random": [],
    "grid": [],
}
AXES = ("val/accuracy", "total/bytes/up")


def plan_of(name: str, seed: int, overrides: list[str]) -> Sweep:
    """Return the sweep of a search."""
    own = [f"seed={seed}", f"tune.seed={seed}", "tracking.uri=none", *SEARCHES[name], *overrides]
    plan = Sweep.load(FILE, own)
    if name in ("nsga2", "tpe"):
        return plan
    if name == "random":
        own += ["tune.search=random"]
        return Sweep.load(FILE, own)
    points = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    order = np.random.default_rng(seed).permutation(len(points))
    options = {key: value for key, value in plan.tree["tune"].items() if key not in ("search", "num_samples")}
    tune = tune_config(options, str(FILE))
    return Sweep.of("grid", plan.tree, tune, [points[n] for n in order], str(FILE))


def go(plan: Sweep, path: Path) -> None:
    """Run the points of a search one after the other; those that are done stay."""
    path.mkdir(parents=True, exist_ok=True)
    if not plan.sample:
        for listed in plan.points:
            one(listed, path)
        return
    suggestions = Suggestions(plan, path, proposer(plan.tune, plan.tree["space"]))
    while (point := suggestions.next()) is not None:
        one(point, path)
        suggestions.ended(point.name)


def one(point: Any, path: Path) -> None:
    """Make or resume the run of a point."""
    place = path / "trials" / point.name
    if status_of(place) == "finished":
        return
    if (place / "config.yaml").exists():
        resume(place)
    else:
        run(point.config, out=place)


def values_of(plan: Sweep, path: Path) -> list[tuple[float, float]]:
    """Return accuracy and bytes of each finished point, in the order in which they were tried."""
    points = drawn(plan, path) if plan.sample else plan.points
    results = [RunFiles(path / "trials" / point.name).result() for point in points]
    return [(found[AXES[0]], found[AXES[1]]) for found in results if found]


def curve(values: list[tuple[float, float]], dense: float) -> list[float]:
    """Return the hypervolume after each trial, as a share of the largest."""
    whole = 0.5 * dense
    return [hypervolume(values[: n + 1], ("max", "min"), (0.5, dense)) / whole for n in range(len(values))]


def main(arguments: list[str] | None = None) -> None:
    """Run the searches and print the hypervolumes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes of the file, e.g. data.root=…")
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="where the runs are")
    parser.add_argument("--read", action="store_true", help="run nothing")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    given = parser.parse_args(arguments)
    plans = {
        (name, seed): plan_of(name, seed, given.overrides) for seed in given.seeds for name in given.searches
    }
    if not given.read:
        for (name, seed), plan in plans.items():
            go(plan, given.out / f"{name}-{seed}")
    found = {key: values_of(plan, given.out / f"{key[0]}-{key[1]}") for key, plan in plans.items()}
    tell(found, list(given.searches), list(given.seeds))


def tell(
    found: dict[tuple[str, int], list[tuple[float, float]]], searches: list[str], seeds: list[int]
) -> None:
    """Print the hypervolume after some numbers of trials: mean and 95 % interval over the seeds."""
    # the largest traffic that any search saw with this seed: a run that prunes nothing
    dense = {seed: max((v[1] for name in searches for v in found[name, seed]), default=1.0) for seed in seeds}
    print(f"hypervolume, % · {len(seeds)} seeds {shortened(seeds)} · reference: accuracy 0.5, dense bytes")
    print("search  " + "".join(f"{n:>4} trials   " for n in SHOWN))
    for name in searches:
        curves = [curve(found[name, seed], dense[seed]) for seed in seeds]
        cells = []
        for n in SHOWN:
            whole = [100 * one[n - 1] for one in curves if len(one) >= n]
            mean, half = mean_and_interval(whole) if whole else (float("nan"), float("nan"))
            cells.append(f"{mean:6.2f} ± {half:4.2f}" if len(whole) > 1 else f"{mean:6.2f}       ")
        print(f"{name:<8}" + "  ".join(cells))
    for seed in seeds:
        ends = {
            name: 100 * curve(found[name, seed], dense[seed])[-1] for name in searches if found[name, seed]
        }
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.2f}" for name, value in ends.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
