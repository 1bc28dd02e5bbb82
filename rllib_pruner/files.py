"""The directory of a training, which is enough to go on with it.

    config.yaml          all of it, defaults included
    progress.jsonl       a line for each evaluation
    checkpoints/         the newest two of RLlib's own
    policy/              the best policy so far: what `method.policy` takes
    curve.png            score and return over the steps, at the end

What is not appended to is written beside its place and renamed.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from fedray import durable
from fedray.durable import local_path, shown
from fedray.errors import ConfigError
from fedray.experiment import sealed
from fedray.experiment.directory import take
from rllib_pruner.config import TrainConfig

KEPT_CHECKPOINTS = 2

Row = dict[str, float]
"""What an evaluation found: `iteration`, `env_steps`, `return` and `length` of episodes, and measures."""


class TrainFiles:
    """One training's directory; use `create` for a new one, `open` for one that is there."""

    def __init__(self, path: Path) -> None:
        self.path = local_path(path).resolve()  # RLlib takes absolute paths only
        self.policy = self.path / "policy"

    @classmethod
    def create(cls, path: Path, config: TrainConfig, *, taken: bool = False) -> "TrainFiles":
        """Make a directory that nobody else has, unless the caller did, and write the config into it.

        Raises:
            ConfigError: if there is something in it.
        """
        files = cls(path)
        if not taken:
            take(files.path, "checkpoints", "training")
        with files._writing("config.yaml") as place:
            sealed.write(place, config.to_tree())
        return files

    @classmethod
    def open(cls, path: Path) -> "TrainFiles":
        """Open the directory of an earlier training.

        Raises:
            ConfigError: if it is not one.
        """
        path = local_path(path)
        if not (path / "config.yaml").is_file() or not (path / "checkpoints").is_dir():
            hint = (
                f"; go on with its trials one by one, in {path}/trials" if (path / "trials").is_dir() else ""
            )
            raise ConfigError(
                f"{path} is not the directory of a training: it has no config.yaml or checkpoints{hint}"
            )
        return cls(path)

    def config(self) -> TrainConfig:
        """Read the config.

        Raises:
            RunError: if it is not as it was written.
        """
        place = self.path / "config.yaml"
        return TrainConfig.from_tree(sealed.load(place), str(place))

    def append(self, row: Row) -> None:
        """Add an evaluation, and see it onto the disk."""
        with self._writing("progress.jsonl") as place:
            durable.append(place, durable.as_lines([row]))

    def progress(self) -> list[Row]:
        """Read all evaluations; a torn last line is left out.

        Raises:
            RunError: if another line is damaged.
        """
        return durable.read_lines(self.path / "progress.jsonl")

    def rewind(self, iteration: int) -> list[Row]:
        """Forget evaluations after an iteration, which are made again; return those that stay."""
        rows = [row for row in self.progress() if row["iteration"] <= iteration]
        with self._writing("progress.jsonl") as place:
            durable.replace(place, durable.as_lines(rows).encode())
        return rows

    def save(self, algorithm: Any, iteration: int) -> None:
        """Write a checkpoint of RLlib's, and keep the newest two."""
        with self._writing(f"checkpoints/iteration-{iteration:06d}") as place:
            partial = place.with_name(f".{place.name}.writing")
            rmtree(partial, ignore_errors=True)
            algorithm.save_to_path(str(partial))
            durable.rename(partial, place)
            durable.keep_newest(self.checkpoints(), KEPT_CHECKPOINTS)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        return sorted((self.path / "checkpoints").glob("iteration-*"), reverse=True)

    def run_id(self) -> str | None:
        """Return the id that the training has in MLflow."""
        known = durable.read_mapping(self.path / "mlflow.json")
        return known["run_id"] if known else None

    def write_run_id(self, run_id: str | None) -> None:
        """Remember that id."""
        if run_id is not None:
            with self._writing("mlflow.json") as place:
                durable.replace(place, (json.dumps({"run_id": run_id}) + "\n").encode())

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """Yield the path of a file that is written.

        Raises:
            RunError: if the disk refuses.
        """
        place = self.path / name
        with durable.on_disk(place, f"`python -m rllib_pruner.train --resume {shown(self.path)}`"):
            yield place


def as_row(iteration: int, env_steps: int, episodes: Mapping[str, Any], measures: Mapping[str, float]) -> Row:
    """Return an evaluation's row; `return` and `length` are missing until an episode has ended."""
    row: Row = {"iteration": iteration, "env_steps": env_steps}
    for name, theirs in (("return", "episode_return_mean"), ("length", "episode_len_mean")):
        if theirs in episodes:
            row[name] = float(episodes[theirs])
    return row | {name: float(value) for name, value in measures.items()}
