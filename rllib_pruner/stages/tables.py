"""The stage agent on held-out micro-federations, beside fixed policies and a bandit."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from fedray.methods.staged import Staged
from fedray.policies.observation import FEATURES, INTERFACE
from fedray.policies.stages import ACTIONS, HOLD
from fedray.policies.trained import TrainedPolicy
from rllib_pruner.config import TrainConfig
from rllib_pruner.stages import logs
from rllib_pruner.stages.env import StageEnv
from rllib_pruner.stages.federations import STAGES
from rllib_pruner.stages.process import HELD_OUT, StageProcess
from rllib_pruner.tables import Table

FRESH = 1_000
"""Offset of the table's federations from those that chose the best policy in training."""

PREFERENCES = (0.03, 0.1, 0.3)
Choose = logs.Choose


def in_order(*names: str) -> Choose:
    """Return a policy that takes the actions of these names in order and then holds."""
    actions = [ACTIONS.index(name) for name in names]
    return lambda stage, _: actions[stage] if stage < len(actions) else HOLD


def cubic(density: float, *last: str) -> Choose:
    """Return a policy that follows a cubic schedule over eight stages as closely as the actions allow.

    Args:
        density: at the end of the schedule.
        last: names of the actions of the last stages.
    """
    follow = logs.scheduled(density, 8, 0.0, np.random.default_rng(0))
    actions = dict(zip(range(STAGES - len(last), STAGES), map(ACTIONS.index, last), strict=True))
    return lambda stage, seen: actions[stage] if stage in actions else follow(stage, seen)


FIXED: dict[str, Choose] = {
    "dense": in_order(),
    "0.09 at the first two stages": in_order("×0.3", "×0.3"),
    "0.1 in eight stages": in_order(*8 * ["×0.75"]),
    "cubic to 0.02": cubic(0.02),
    "cubic to 0.05": cubic(0.05),
    "cubic to 0.1": cubic(0.1),
    "cubic to 0.2": cubic(0.2),
    "cubic to 0.1, regrown at the end": cubic(0.1, "×1.25", "×1.25"),
}


@dataclass(frozen=True)
class Ends:
    """Ends of a policy's runs at one λ: (federations,) each."""

    accuracy: NDArray[np.float64]
    bytes: NDArray[np.float64]
    flops: NDArray[np.float64]

    def returned(self, preference: float, flops_weight: float) -> NDArray[np.float64]:
        """Return final accuracy − λ · (bytes + flops_weight · FLOPs)."""
        return self.accuracy - preference * (self.bytes + flops_weight * self.flops)


def tables(policy: Path | None, problems: int, with_cost: bool, root: Path | None = None) -> list[Table]:
    """Compare a trained policy with fixed policies and with the bandit.

    Args:
        policy: its folder; None: the shipped policy.
        problems: held-out federations.
        with_cost: also measure the time of a decision.
        root: folder of the downloaded data sets; None: the default cache.
    """
    trained = TrainedPolicy.load(policy, INTERFACE)
    found = [comparison(trained, process_of(trained, root), problems)]
    return [*found, _decision(trained)] if with_cost else found


def comparison(trained: TrainedPolicy, process: StageProcess, problems: int) -> Table:
    """Play held-out federations with the agent, the bandit and fixed policies, at each λ."""
    options = {"flops_weight": process.flops_weight, "steepest": Staged.steepest}  # as in a run
    env = StageEnv({"federations": asdict(process.federations), **options})
    numbers = [HELD_OUT + FRESH + number for number in range(problems)]

    def ends(choose: Callable[[], Choose], preference: float) -> Ends:
        last = [logs.play(env, number, choose(), preference)[-1] for number in numbers]
        return Ends(*(np.array([row[k] for row in last]) for k in ("accuracy", "spent_bytes", "spent_flops")))

    rows: list[list[str]] = []
    fixed = {name: ends(lambda c=choose: c, 0.1) for name, choose in FIXED.items()}  # type: ignore[misc]
    for preference in PREFERENCES:
        played = {
            "agent": ends(lambda: lambda _, seen: trained.act(seen), preference),
            "bandit": ends(lambda: lambda *_: env.asked_by_bandit(), preference),
            **fixed,
        }
        agent = played["agent"].returned(preference, process.flops_weight)
        rows += [_row(name, e, preference, process.flops_weight, agent) for name, e in played.items()]
    columns = ("λ, policy", "accuracy", "bytes", "return", "agent better by", "agent better in")
    note = (
        f"{problems} federations of digits and MNIST that training never saw; bytes as a share of the dense "
        "model's; the difference of returns ± half of the 95 % t-interval, paired by federation."
    )
    return Table("On held-out micro-federations", columns, rows, note)


def process_of(trained: TrainedPolicy, root: Path | None) -> StageProcess:
    """Return the process of the policy's config, with the data sets in `root`."""
    options = TrainConfig.from_tree(trained.about["config"], "policy.json").process.options
    assert isinstance(options, StageProcess)
    return replace(options, federations=replace(options.federations, root=root))


def _row(
    name: str, ends: Ends, preference: float, flops_weight: float, agent: NDArray[np.float64]
) -> list[str]:
    from fedray.report.table import mean_and_interval

    returns = ends.returned(preference, flops_weight)
    mean, half = mean_and_interval((agent - returns).tolist())
    same = name == "agent"
    return [
        f"{preference:g}, {name}",
        f"{ends.accuracy.mean():.3f}",
        f"{ends.bytes.mean():.3f}",
        f"{returns.mean():.3f}",
        "" if same else f"{mean:+.3f} ±{half:.3f}",
        "" if same else f"{(agent > returns).mean():.0%}",
    ]


def _decision(trained: TrainedPolicy) -> Table:
    """Measure the time of one decision of the network."""
    seen = np.zeros(len(FEATURES), dtype=np.float32)
    trained.act(seen)
    taken: list[float] = []
    for _ in range(200):
        started = perf_counter()
        trained.act(seen)
        taken.append(1000 * (perf_counter() - started))
    median, p95 = np.quantile(taken, (0.5, 0.95))
    rows: Sequence[Sequence[str]] = [["stage agent", f"{median:.2f}", f"{p95:.2f}"]]
    return Table("One decision of the network", ("policy", "median ms", "95th percentile ms"), rows)
