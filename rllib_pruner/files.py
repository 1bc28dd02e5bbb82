"""The directory of a training, which is enough to go on with it.

    config.yaml          all of it, defaults included
    progress.jsonl       a line for each evaluation
    checkpoints/         the newest two of RLlib's own
    policy/              the best policy so far: what `method.policy` takes
    curve.png            score and return over the steps, at the end

What is not appended to is written beside its place and renamed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

from fedray.errors import ConfigError
from fedray.experiment import yaml
from fedray.experiment.files import check_free
from rllib_pruner.config import TrainConfig

KEPT_CHECKPOINTS = 2

Row = dict[str, float]
"""What an evaluation found: `iteration`, `env_steps`, `return` and `length` of episodes, and measures."""


class TrainFiles:
    """One training's directory; use `create` for a new one, `open` for one that is there."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # RLlib takes absolute paths only
        self.policy = self.path / "policy"

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "TrainFiles":
        """Make a directory that nobody else has, with the config in it.

        Raises:
            ConfigError: if there is something in it.
        """
        check_free(path)
        files = cls(path)
        files.path.mkdir(parents=True, exist_ok=True)
        try:
            (files.path / "checkpoints").mkdir()  # fails for the second of two that start at once
        except FileExistsError:
            raise ConfigError(
                f"{path} is another training's directory: choose a new one with --out"
            ) from None
        files._write("config.yaml", yaml.dump(config.to_tree()))
        return files

    @classmethod
    def open(cls, path: Path) -> "TrainFiles":
        """Open the directory of an earlier training.

        Raises:
            ConfigError: if it is not one.
        """
        if not (path / "config.yaml").is_file() or not (path / "checkpoints").is_dir():
            hint = (
                f"; go on with its trials one by one, in {path}/trials" if (path / "trials").is_dir() else ""
            )
            raise ConfigError(
                f"{path} is not the directory of a training: it has no config.yaml or checkpoints{hint}"
            )
        return cls(path)

    def config(self) -> TrainConfig:
        """Read the config."""
        place = self.path / "config.yaml"
        return TrainConfig.from_tree(yaml.load(place), str(place))

    def append(self, row: Row) -> None:
        """Add an evaluation, and see it onto the disk."""
        with open(self.path / "progress.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def progress(self) -> list[Row]:
        """Read all evaluations; a torn last line is left out."""
        place = self.path / "progress.jsonl"
        rows: list[Row] = []
        for text in place.read_text(encoding="utf-8").splitlines() if place.is_file() else []:
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, iteration: int) -> list[Row]:
        """Forget evaluations after an iteration, which are made again; return those that stay."""
        rows = [row for row in self.progress() if row["iteration"] <= iteration]
        self._write("progress.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def save(self, algorithm: Any, iteration: int) -> None:
        """Write a checkpoint of RLlib's, and keep the newest two."""
        place = self.path / "checkpoints" / f"iteration-{iteration:06d}"
        partial = place.with_name(f".{place.name}.writing")
        rmtree(partial, ignore_errors=True)
        algorithm.save_to_path(str(partial))
        partial.rename(place)
        for old in self.checkpoints()[KEPT_CHECKPOINTS:]:
            rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        return sorted((self.path / "checkpoints").glob("iteration-*"), reverse=True)

    def run_id(self) -> str | None:
        """Return the id that the training has in MLflow."""
        place = self.path / "mlflow.json"
        return json.loads(place.read_text(encoding="utf-8"))["run_id"] if place.is_file() else None

    def write_run_id(self, run_id: str | None) -> None:
        """Remember that id."""
        if run_id is not None:
            self._write("mlflow.json", json.dumps({"run_id": run_id}) + "\n")

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}.writing"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)


def as_row(iteration: int, env_steps: int, episodes: Mapping[str, Any], measures: Mapping[str, float]) -> Row:
    """Return an evaluation's row; `return` and `length` are missing until an episode has ended."""
    row: Row = {"iteration": iteration, "env_steps": env_steps}
    for name, theirs in (("return", "episode_return_mean"), ("length", "episode_len_mean")):
        if theirs in episodes:
            row[name] = float(episodes[theirs])
    return row | {name: float(value) for name, value in measures.items()}
