"""FRLP's agent beside other solvers of its process: `scan`, `bisect`, and Q-learning with a table."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fedray.methods.frlp import FRLP
from fedray.policies.line_search import bisect, scan
from fedray.policies.rate_search import INTERFACE, RateSearch
from fedray.policies.trained import PolicyInterface, TrainedPolicy
from rllib_pruner.processes import Acts, walk_together
from rllib_pruner.rate_search.curves import FAMILIES, SPAN, Curve, Family, held_out
from rllib_pruner.rate_search.server_cost import FineTune
from rllib_pruner.rate_search.tabular import TabularQ
from rllib_pruner.tables import Table

TABULAR_EPISODES = 2000
SOLVERS = ("dqn", "tabular", "scan", "bisect")

Solved = tuple[np.ndarray, np.ndarray]
"""For each curve: the rate that a solver settles on, and the number of candidates it fine-tuned."""


@dataclass(frozen=True)
class Outcome:
    """Results of all solvers on the curves of a family, at one stride."""

    family: Family
    stride: int
    clean_rates: np.ndarray
    solved: dict[str, Solved]

    def row(self, solver: str) -> list[str]:
        """Return a solver's row of the table."""
        rates, tries = self.solved[solver]
        same = np.mean(np.isclose(rates, self.solved["scan"][0], atol=1e-9))
        off = np.abs(rates - self.clean_rates)
        missed = np.mean((rates > SPAN - 1e-9) & (self.clean_rates < SPAN - 1e-9))
        return [
            f"{self.family}, {solver}",
            str(self.stride),
            f"{same:.1%}",
            f"{100 * off.mean():.2f}",
            f"{missed:.1%}",
            f"{tries.mean():.1f}",
            f"{tries.max()}",
        ]


def tables(policy: Path | None, curves: int, with_cost: bool, root: Path | None = None) -> list[Table]:
    """Compare a policy with the line searches.

    Args:
        policy: its folder; None: the shipped policy.
        curves: held-out curves of each family, at the paper's step and FRLP's default range.
        with_cost: also measure the server's fine-tuning, which takes minutes.
        root: not used: curves need no data.
    """
    agent = TrainedPolicy.load(policy, INTERFACE)
    table = TabularQ()
    steps = table.learn(TABULAR_EPISODES)
    strides = (1, FRLP().stride)
    outcomes = [
        outcome(family, stride, curves, {"dqn": agent.acts, "tabular": table.acts})
        for stride in strides
        for family in FAMILIES
    ]
    found = [_decisions(outcomes, curves, steps), _decision_time(policy)]
    return [*found, _cost([o for o in outcomes if o.family == "monotone"])] if with_cost else found


def outcome(family: Family, stride: int, count: int, agents: dict[str, Acts]) -> Outcome:
    """Let every solver settle on every curve of a family."""
    curves = held_out(family, count, seed=1)  # seed 0 judged the policy in training
    solved = {name: _walked(curves, acts, stride) for name, acts in agents.items()}
    for name, line_search in (("scan", scan), ("bisect", bisect)):
        solved[name] = _searched(curves, partial(line_search, stride=stride))
    clean = _searched([curve.clean() for curve in curves], partial(scan, stride=1))
    return Outcome(family, stride, clean[0], solved)


def _search(curve: Curve) -> RateSearch:
    return RateSearch(1.0, 1 - SPAN, curve)


def _walked(curves: Sequence[Curve], acts: Acts, stride: int) -> Solved:
    searches = [_search(curve) for curve in curves]
    walk_together(searches, acts, stride)
    return _solved(searches, [search.settled for search in searches])


def _searched(curves: Sequence[Curve], line_search: Callable[[RateSearch], int]) -> Solved:
    searches = [_search(curve) for curve in curves]
    return _solved(searches, [line_search(search) for search in searches])


def _solved(searches: Sequence[RateSearch], states: Sequence[int]) -> Solved:
    rates = [1 - search.density(state) for search, state in zip(searches, states, strict=True)]
    return np.array(rates), np.array([search.evaluations for search in searches])


def _decisions(outcomes: Sequence[Outcome], curves: int, steps: int) -> Table:
    return Table(
        "Where the solvers settle",
        (
            "curves, solver",
            "stride",
            "same rate as scan",
            "points off the clean curve's answer",
            "drifts to the limit",
            "fine-tunes, mean",
            "max",
        ),
        [outcome.row(solver) for outcome in outcomes for solver in SOLVERS],
        f"{curves:,} held-out curves of each family, range 0.5, step 0.0005. The clean curve's answer: a "
        "scan of every state without noise; to drift: to settle on the limit although that curve has an end. "
        "Fine-tunes include the 6 samples. tabular: Q-learning with a table, "
        f"{TABULAR_EPISODES:,} episodes, {steps:,} steps.",
    )


_TIMED = """
import json, sys, time
from pathlib import Path
import numpy as np
from fedray.policies.trained import PolicyInterface, TrainedPolicy
started = time.perf_counter()
folder, process, version, features, actions = json.loads(sys.argv[1])
interface = PolicyInterface(process, version, features, tuple(actions))
agent = TrainedPolicy.load(folder and Path(folder), interface)
loaded_s = time.perf_counter() - started
observations = np.linspace(0, 1, 1000 * features, dtype=np.float32).reshape(1000, features)
seconds = []
for observation in observations:
    started = time.perf_counter()
    agent.act(observation)
    seconds.append(time.perf_counter() - started)
print(json.dumps([loaded_s, *np.percentile(seconds[10:], [50, 95]).tolist()]))
"""


def decision_seconds(policy: Path | None, interface: PolicyInterface) -> tuple[float, float, float]:
    """Return seconds to load a policy in a fresh process, and median and 95th percentile of a decision."""
    given = json.dumps([policy and str(policy.resolve()), *astuple(interface)])
    command = [sys.executable, "-c", _TIMED, given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    load_s, median_s, p95_s = json.loads(done.stdout.splitlines()[-1])
    return load_s, median_s, p95_s


def _decision_time(policy: Path | None) -> Table:
    load_s, median_s, p95_s = decision_seconds(policy, INTERFACE)
    return Table(
        "Time of a decision of the agent",
        ("", "load s", "decision ms, median", "95th percentile"),
        [["dqn", f"{load_s:.1f}", f"{1000 * median_s:.2f}", f"{1000 * p95_s:.2f}"]],
        "In a fresh process; loading includes the import of RLlib. 990 single decisions, after ten more.",
    )


def _cost(outcomes: Sequence[Outcome]) -> Table:
    rows = []
    for tune, measured in (
        (FineTune("cnn", "fashion_mnist", 1200), 60),
        (FineTune("resnet18", "cifar10", 1000), 6),
    ):
        wall_s, cpu_s = tune.measure(measured)
        fine_tune_s = cpu_s * tune.steps()
        what = f"{tune.model}, {tune.examples:,} × {tune.data}"
        for outcome in outcomes:
            for solver in ("dqn", "scan", "bisect"):
                tries = outcome.solved[solver][1]
                figures = (tries.mean(), fine_tune_s * tries.mean(), fine_tune_s * tries.max())
                row = [f"{what}, {solver}", str(outcome.stride), f"{wall_s:.3f}", f"{cpu_s:.3f}"]
                rows.append([*row, f"{fine_tune_s:.1f}", *(f"{figure:,.1f}" for figure in figures)])
    return Table(
        "Server seconds of a pruning event",
        (
            "model, solver",
            "stride",
            "wall s per step",
            "CPU s per step",
            "s per fine-tune",
            "fine-tunes, mean",
            "s per event, mean",
            "max",
        ),
        rows,
        "A fine-tune is one masked epoch at density 0.75, batches of 20, one thread, on made-up images. The "
        "seconds of a step are measured (cnn: over a whole epoch of 60 steps; resnet18: over 6 steps, then "
        "times the 50 of an epoch). A fine-tune is counted in seconds of its CPU, which are the clock's "
        "on a machine with nothing else to do; an event is that times the fine-tunes on the monotone curves.",
    )
