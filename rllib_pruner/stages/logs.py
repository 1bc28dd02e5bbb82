"""Logs of micro-federations: observation, action and outcome of each stage.

Random behaviour policies play the episodes: half of them prune for a while and then mostly hold, the others
follow a schedule to a density. Ray tasks play several shards in parallel; an interrupted collection continues
with the missing shards. The policies ignore the preference, so that one log serves every λ.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedray.config import sealed
from fedray.config.overrides import plain_copy
from fedray.config.trees import flat_text
from fedray.durable import local_path, on_disk
from fedray.errors import RunError
from fedray.parquet import read_table, write_table
from fedray.policies import observation
from fedray.policies.observation import FEATURES
from fedray.policies.stages import ACTIONS, FACTORS, HOLD
from fedray.pruning.schedules import cubic
from fedray.storage.directory import Lock
from rllib_pruner.stages.env import StageEnv
from rllib_pruner.stages.federations import STAGES

SHARD = 25
"""Episodes in one file."""
ORIGIN = "origin.yaml"
"""Describes the federations of the episodes."""

OUTCOME = ("accuracy", "spent_bytes", "spent_flops", "density", "executed")
COLUMNS = ("episode", "stage", "action", *OUTCOME, *(f"x{i}" for i in range(len(FEATURES) - 1)))
"""A row is a stage of an episode; the last row of an episode is the end of its run, with action −1."""

Choose = Callable[[int, NDArray[np.float32]], int]
"""(stage, observation) → action."""


def behaviour(rng: np.random.Generator) -> Choose:
    """Return a random behaviour policy, of either kind."""
    if rng.random() >= 0.5:
        return eager(rng)
    final = float(np.exp(rng.uniform(np.log(0.01), 0.0)))
    until = int(rng.integers(1, STAGES + 1))
    return scheduled(final, until, float(rng.choice([0.0, 0.1, 0.3])), rng)


def scheduled(final: float, until: int, random_share: float, rng: np.random.Generator) -> Choose:
    """Return a policy that follows a cubic schedule as closely as the actions allow.

    Args:
        final: density at the end of the schedule.
        until: stages of the schedule.
        random_share: probability of a random action instead.
        rng: of the random actions.
    """
    factors = np.log(FACTORS)

    def choose(stage: int, seen: NDArray[np.float32]) -> int:
        if rng.random() < random_share:
            return int(rng.integers(len(ACTIONS)))
        target = cubic(min(1.0, (stage + 1) / until), 1.0, final)
        density = max(1e-3, float(seen[FEATURES.index("density")]))
        return int(np.argmin(abs(factors - np.log(target / density))))

    return choose


def eager(rng: np.random.Generator) -> Choose:
    """Return a random behaviour policy: it prunes for some stages, then mostly holds."""
    until = int(rng.integers(0, STAGES + 1))
    early, late = rng.dirichlet(np.full(len(ACTIONS), 0.5)), rng.dirichlet(np.full(len(ACTIONS), 0.5))
    late = 0.5 * late + 0.5 * np.eye(len(ACTIONS))[HOLD]
    uniform = np.full(len(ACTIONS), 1 / len(ACTIONS))

    def choose(stage: int, _: NDArray[np.float32]) -> int:
        preferred = early if stage < until else late
        return int(rng.choice(len(ACTIONS), p=0.9 * preferred + 0.1 * uniform))

    return choose


def play(env: StageEnv, federation: int, choose: Choose, preference: float = 0.1) -> list[dict[str, Any]]:
    """Play one episode; return a row of COLUMNS for each stage, and one for the end."""
    seen, info = env.reset(options={"federation": federation, "preference": preference})
    rows: list[dict[str, Any]] = []
    ended = False
    while not ended:
        action = choose(len(rows), seen)
        rows.append(_row(federation, len(rows), action, seen, info))
        seen, _, ended, _, info = env.step(np.int64(action))
        rows[-1]["executed"] = info["executed"]
    rows.append(_row(federation, len(rows), -1, seen, info))
    return rows


def _row(
    federation: int, stage: int, action: int, seen: NDArray[np.float32], info: Mapping[str, Any]
) -> dict[str, Any]:
    features = {f"x{i}": float(value) for i, value in enumerate(seen[:-1])}
    return {
        "episode": federation,
        "stage": stage,
        "action": action,
        **{name: info[name] for name in OUTCOME},
        **features,
    }


def collect(
    folder: Path, federations: Mapping[str, Any], episodes: int, seed: int, parallel: int = 2
) -> Iterator[int]:
    """Play the missing shards of a log; yield the number of logged episodes after each.

    Args:
        folder: of the shards.
        federations: options of `Federations`.
        episodes: of the whole log; rounded up to whole shards.
        seed: of the first federation; episode i is federation `seed + i`.
        parallel: shards that are played in parallel, each in a Ray task with one CPU.

    Raises:
        RunError: if the folder holds episodes of other federations, or another process uses it.
    """
    folder = local_path(folder)
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, "collection of episodes"):
        _claim(folder, federations, seed)
        yield from _play_missing(folder, federations, episodes, seed, parallel)


def _claim(folder: Path, federations: Mapping[str, Any], seed: int) -> None:
    """Write the origin of a new log; refuse a log of another origin."""
    origin = plain_copy(
        {
            "process": {"federations": dict(federations), "first": seed},
            "observation": observation.VERSION,
            "actions": ACTIONS,
            "columns": COLUMNS,
            "shard": SHARD,
        }
    )
    path = folder / ORIGIN
    if not path.is_file():
        if any(folder.glob("*.parquet")):
            raise RunError(
                f"{folder}: an earlier version made this log and did not write its federations; give "
                "process.log another folder"
            )
        with on_disk(path):
            sealed.write(path, origin)
    written, asked = flat_text(sealed.load(path)), flat_text(origin)
    written.setdefault("actions", asked["actions"])  # an earlier version did not write them
    differ = [
        f"{key}: {written.get(key, 'absent')} in the log, {asked.get(key, 'absent')} now"
        for key in dict.fromkeys((*written, *asked))
        if written.get(key) != asked.get(key)
    ]
    if differ:
        raise RunError(
            f"{folder}: the log is of other federations: {'; '.join(differ)}. Give process.log another "
            "folder, or restore the values"
        )


def _play_missing(
    folder: Path, federations: Mapping[str, Any], episodes: int, seed: int, parallel: int
) -> Iterator[int]:
    shards = range(-(-episodes // SHARD))
    missing = [index for index in shards if not _shard(folder, index).exists()]
    done = len(shards) - len(missing)
    yield done * SHARD
    if not missing:
        return
    from fedray.experiment.cluster import start_ray

    start_ray()
    import ray

    task = ray.remote(num_cpus=1)(play_shard)
    waiting = list(missing)
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < parallel:
            index = waiting.pop(0)
            running.append(task.remote(dict(federations), _shard(folder, index), seed + index * SHARD))
        finished, running = ray.wait(running, num_returns=1)
        ray.get(finished)
        done += len(finished)
        yield done * SHARD


def play_shard(federations: Mapping[str, Any], file: Path, first: int) -> None:
    """Play the episodes of one shard and write it."""
    import torch

    torch.set_num_threads(1)
    env = StageEnv({"federations": dict(federations)})
    rows: list[dict[str, Any]] = []
    for number in range(first, first + SHARD):
        rows += play(env, number, behaviour(np.random.default_rng((number, 1))))
    write(rows, file)


def write(rows: Sequence[Mapping[Any, Any]], file: Path) -> None:
    """Write a shard atomically."""
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    with on_disk(file, "start the training again: it plays the missing shards"):
        write_table(file, {name: frame[name] for name in COLUMNS})


def load(folder: Path) -> pd.DataFrame:
    """Return the rows of all shards.

    Raises:
        FileNotFoundError: if there is none.
        RunError: if one is damaged; once the file is removed, its episodes are played again.
    """
    rows = read_table(folder)
    if rows is None or rows.empty:
        raise FileNotFoundError(f"no log of episodes in {folder}; `fedray agent train` collects one")
    return rows


def _shard(folder: Path, index: int) -> Path:
    return folder / f"episodes-{index:05d}.parquet"
