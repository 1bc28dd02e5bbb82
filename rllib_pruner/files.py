"""The directory of a training; a training can be resumed from it.

    config.yaml          the config, with all defaults
    progress.jsonl       a line for each evaluation
    checkpoints/         the newest two of RLlib's own
    policy/              the best policy so far, for `method.policy` or `method.agent`
    curve.png            score and return over the steps, at the end

Files other than progress.jsonl are written under a temporary name and renamed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

from fedray import durable
from fedray.config import sealed, yaml_text
from fedray.config.trees import flat_text
from fedray.durable import local_path, shown
from fedray.errors import ConfigError, RunError
from fedray.report.reading import TRACKED
from fedray.storage.directory import take
from rllib_pruner.config import TrainConfig

KEPT_CHECKPOINTS = 2
DIGESTS = "digests.json"
"""Of a checkpoint's other files."""

Row = dict[str, float]
"""An evaluation: `iteration`, `env_steps`, `return` and `length` of episodes, and the process's measures."""


class TrainFiles:
    """One training's directory; `create` makes one, `open` opens an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = local_path(path).resolve()  # RLlib takes absolute paths only
        self.policy = self.path / "policy"

    @classmethod
    def create(cls, path: Path, config: TrainConfig, *, taken: bool = False) -> "TrainFiles":
        """Make a new directory, unless the caller did, and write the config into it.

        Raises:
            ConfigError: if there is something in it.
        """
        files = cls(path)
        if not taken:
            take(files.path, "checkpoints", "training")
        with files.writing("config.yaml") as place:
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
            hint = f"; resume its trials one by one, in {path}/trials" if (path / "trials").is_dir() else ""
            raise ConfigError(
                f"{path} is not the directory of a training: it has no config.yaml or checkpoints{hint}"
            )
        files = cls(path)
        durable.restore_folder(files.policy)
        return files

    def config(self) -> TrainConfig:
        """Read the config.

        Raises:
            RunError: if the file was changed, with the differences to the newest checkpoint's config.
        """
        place = self.path / "config.yaml"
        problem = sealed.fault(place)
        if problem is None:
            return TrainConfig.from_tree(yaml_text.load(place), str(place))
        newest = self.checkpoints()[:1]
        copy = newest[0] / "config.yaml" if newest else place
        was, now = flat_text(yaml_text.load(copy)) if copy.is_file() else {}, flat_text(yaml_text.load(place))
        changed = [
            f"{key}: {was.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} in config.yaml"
            for key in dict.fromkeys((*was, *now))
            if was and was.get(key) != now.get(key)
        ]
        raise RunError(
            f"{place}: {problem}{': ' if changed else ''}{'; '.join(changed)}. Put the values back"
        )

    def append(self, row: Row) -> None:
        """Append an evaluation and flush it to the disk."""
        with self.writing("progress.jsonl") as place:
            durable.append_lines(place, [row])

    def progress(self) -> list[Row]:
        """Read all evaluations; a torn last line is left out.

        Raises:
            RunError: if another line is damaged.
        """
        advice = "restore it from a copy, or start a new training"
        try:
            rows = durable.read_lines(self.path / "progress.jsonl")
        except RunError as error:
            raise RunError(f"{error}; {advice}") from error
        for number, row in enumerate(rows, start=1):
            if not all(
                isinstance(row.get(name), int | float) for name in ("iteration", "env_steps", "score")
            ):
                raise RunError(f"{self.path / 'progress.jsonl'}, line {number}: not an evaluation; {advice}")
        return rows

    def rewind(self) -> tuple[list[Row], Path | None]:
        """Go back to the newest sound checkpoint; later evaluations are dropped and made again.

        Returns:
            The remaining evaluations and the checkpoint; [] and None before the first.

        Raises:
            RunError: if there are checkpoints, or evaluations, but no sound checkpoint; nothing is changed.
        """
        rows = self.progress()
        evaluated = {int(row["iteration"]) for row in rows}
        # a checkpoint is written before its evaluation; a crash may have come in between
        usable = [path for path in self.checkpoints() if _iteration(path) in evaluated and _is_sound(path)]
        if rows and not usable:
            names = ", ".join(place.name for place in self.checkpoints()) or "there is none"
            raise RunError(
                f"{shown(self.path)} cannot be resumed: no checkpoint is as it was written ({names}); "
                "restore the folder from a copy, or start a new training"
            )
        last = _iteration(usable[0]) if usable else 0
        with self.writing("checkpoints"):
            for place in self.checkpoints():
                if _iteration(place) > last:
                    durable.replace_folder(place, place.with_name(f"unusable-{place.name}"))
        rows = [row for row in rows if row["iteration"] <= last]
        with self.writing("progress.jsonl") as lines:
            durable.replace(lines, durable.as_lines(rows))
        return rows, usable[0] if usable else None

    def save(self, algorithm: Any, iteration: int) -> None:
        """Write a checkpoint of RLlib with the config and the digests of its files; keep the newest two."""
        with self.writing(f"checkpoints/iteration-{iteration:06d}") as place:
            partial = place.with_name(f".{place.name}.writing")
            rmtree(partial, ignore_errors=True)
            algorithm.save_to_path(str(partial))
            copyfile(self.path / "config.yaml", partial / "config.yaml")
            durable.replace(partial / DIGESTS, durable.as_mapping(durable.digests(partial)))
            durable.replace_folder(partial, place)
            durable.keep_newest(self.checkpoints(), KEPT_CHECKPOINTS)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        return sorted((self.path / "checkpoints").glob("iteration-*"), reverse=True)

    def run_id(self) -> str | None:
        """Return the training's run id in MLflow."""
        return (TRACKED.read(self.path) or {}).get("run_id")

    def write_run_id(self, run_id: str | None) -> None:
        """Write that id, if there is one."""
        if run_id is not None:
            with self.writing(TRACKED.name) as place:
                durable.replace(place, durable.as_mapping({"run_id": run_id}))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield the path of a file to write.

        Raises:
            RunError: if the file cannot be written.
        """
        place = self.path / name
        durable.pass_fences(place)
        with durable.on_disk(place, f"`fedray agent train --resume {shown(self.path)}`"):
            yield place


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _is_sound(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are unchanged."""
    try:
        written = durable.read_mapping(checkpoint / DIGESTS)
        found = durable.digests(checkpoint)
    except (OSError, RunError):
        return False
    return written == {name: digest for name, digest in found.items() if name != DIGESTS}


def as_row(iteration: int, env_steps: int, episodes: Mapping[str, Any], measures: Mapping[str, float]) -> Row:
    """Return an evaluation's row; it has no `return` and `length` before an episode has ended."""
    row: Row = {"iteration": iteration, "env_steps": env_steps}
    for name, theirs in (("return", "episode_return_mean"), ("length", "episode_len_mean")):
        if theirs in episodes:
            row[name] = float(episodes[theirs])
    return row | {name: float(value) for name, value in measures.items()}
