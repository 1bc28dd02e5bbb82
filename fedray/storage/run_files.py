"""The files of a run. A crash at any moment leaves a directory that can be read and resumed.

    config.yaml              the whole config, defaults included
    imports.json             path and SHA-256 of each Python file that the run has imported
    made_by.json             processor, versions and commit of each process that made rounds of it
    data.json                the data set: source; examples, shape and digest of each part
    rounds.jsonl             one line a round; only the last line can be torn
    clients.parquet/         a row per client and round, in part files written at each checkpoint
    client_accuracy.parquet  the final model on each client's own examples (held out, if any are)
    checkpoints/             the newest two; the older one is used if the newer is damaged
    model.safetensors        the final model, by name
    result.json              every final metric under its name, `weights_sha256`, `status`: written last
    warnings.txt, mlflow.json   if there are warnings; if MLflow tracks the run
    client_errors.txt           the tracebacks of clients that failed, if any did
    mlflow-sent.jsonl           points on their way to MLflow, until it has all
    tensorboard/, wandb/        if `tracking.also` names them
    ended-000100/            result, model and accuracies after round 100, if a resume then added rounds
    published.json           which generation in an object store it came from, if `storage` names one
    .lock                    locked while a process works here
    .stop                    asks that process to end after its round (`fedray stop`)

A file that is not appended to is written under another name and renamed (`fedray.durable`).

Every file but the texts has a checksum in it: JSON has one as the last key, `checksum`, of each file and
line, the YAML in a comment, tables and the model in their metadata. A reader refuses a damaged file by its
name; `resume` makes again what it can. A file of an earlier version has none, and is read unchecked.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedray import durable
from fedray.config import sealed
from fedray.config.trees import Tree
from fedray.durable import local_path, read_mapping, shown
from fedray.errors import ConfigError, RunError, without_secrets
from fedray.federation.server import Checkpoint
from fedray.parquet import read_table, write_table
from fedray.report.reading import (
    check_rounds,
    missing_rows,
    newest_saved,
    read_result,
    scan_rounds,
    sound_rounds,
)
from fedray.storage import checkpoint as stored
from fedray.storage.checkpoint import Damaged, Stored
from fedray.storage.directory import check_held, take
from fedray.types import ClientRecord, Params, RoundReport

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
MODEL, RESULT = "model.safetensors", "result.json"
SHA256 = "weights_sha256"
"""Key of the weights' SHA-256 in the metadata of `model.safetensors`."""

_PART = re.compile(r"part-([0-9]+)-([0-9]+)")
CLIENT_ERRORS = "client_errors.txt"
"""File of the tracebacks of clients that failed."""


class RunFiles:
    """One run's directory.

    Args:
        path: the directory; use `create` for a new one, `open` for an existing one.
    """

    def __init__(self, path: Path) -> None:
        self.path = local_path(path)
        self._unwritten: list[tuple[int, ClientRecord]] = []
        self.on_saved: Callable[[], object] = lambda: None
        """Called after each checkpoint."""

    @classmethod
    def create(cls, path: Path) -> "RunFiles":
        """Create a directory for one run, or take an empty one.

        Raises:
            ConfigError: if it is not empty.
        """
        take(local_path(path), "checkpoints", "run")
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> "RunFiles":
        """Open the directory of an earlier run.

        Raises:
            ConfigError: if it is not the directory of a run.
        """
        place = local_path(path)
        if not (place / "config.yaml").is_file():
            raise ConfigError(f"{shown(place)} is not the directory of a run: it has no config.yaml")
        return cls(place)

    # ── during the run
    # ────────────────────────────────────────────────────────────────────────────────

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Write `config.yaml`, with the SHA-256 of its values."""
        with self._writing("config.yaml") as path:
            sealed.write(path, tree)

    def read_config(self) -> Tree:
        """Read `config.yaml`.

        Raises:
            ConfigError, RunError: if it cannot be read, or its values are not those that were written.
        """
        return sealed.look(self.path / "config.yaml")

    def append(self, report: RoundReport) -> None:
        """Add a round and flush it to disk; its client records are written with the next checkpoint."""
        line = {"round": report.round, "metrics": _plain(report.metrics), "notes": list(report.notes)}
        with self._writing("rounds.jsonl") as path:
            durable.append_lines(path, [line])
        self._unwritten += [(report.round, record) for record in report.clients]
        errors = [fault for fault in report.faults if fault.traceback]
        told = "".join(f"round {report.round}, client {e.client}:\n{e.traceback}\n" for e in errors)
        if told:
            with self._writing(CLIENT_ERRORS) as path:
                durable.append(path, told)

    def save(self, checkpoint: Checkpoint, config: Tree | None = None) -> None:
        """Write the clients' rows so far and a checkpoint; keep the newest two.

        Args:
            checkpoint: after a round.
            config: the run's whole config, to which the checkpoint belongs.
        """
        self._write_rows()
        with self._writing(f"checkpoints/{stored.name_of(checkpoint.state.round)}") as path:
            if not path.parent.exists():  # a copy of a run that had none yet
                path.parent.mkdir(exist_ok=True)
            stored.write(path, checkpoint, config or {})
            durable.keep_newest(self.checkpoints(), KEPT_CHECKPOINTS)
        self.on_saved()

    def warn(self, warnings: Iterable[str]) -> None:
        """Record warnings for readers of the run."""
        text = "".join(f"{without_secrets(warning)}\n" for warning in warnings)
        if text:
            with self._writing("warnings.txt") as path:
                durable.append(path, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        with self._writing(name) as path:
            durable.replace(path, durable.as_mapping(_plain(value)))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file; None if it is missing.

        Raises:
            RunError: if it is damaged, or cannot be read.
        """
        return read_mapping(self.path / name)

    def result(self) -> dict[str, Any] | None:
        """Read `result.json`; None if it is missing, or damaged, which is logged: resume makes it again."""
        try:
            return read_result(self.path)
        except RunError as error:
            logger.warning("%s; `fedray resume %s` makes it again", error, shown(self.path))
            return None

    # ── at its end
    # ───────────────────────────────────────────────────────────────────────────────────────────

    def write_model(self, params: Params) -> Path:
        """Write `model.safetensors`, tensors by name."""
        from safetensors.torch import save

        with self._writing(MODEL) as path:
            tensors = {name: tensor.contiguous() for name, tensor in params.items()}
            durable.replace(path, save(tensors, {SHA256: params.sha256}))
            return path

    def write_client_accuracy(self, rows: Mapping[str, Any]) -> None:
        """Write `client_accuracy.parquet` from columns."""
        with self._writing("client_accuracy.parquet") as path:
            write_table(path, rows)

    # ── going on
    # ─────────────────────────────────────────────────────────────────────────────────────────────

    def load(self) -> Stored | None:
        """Read the newest sound checkpoint of a round that `rounds.jsonl` has; None if there is none.

        Nothing is changed.

        Raises:
            RunError: if there are checkpoints, or rounds, but none of the checkpoints can be used.
        """
        found, problems = self._newest()
        if found is not None:
            return found
        rounds, hole = scan_rounds(self.path / "rounds.jsonl")
        old = sorted((self.path / "checkpoints").glob("round-*.pt"))
        if old:
            text = "was written by fedray 0.1.0 in a format that this version does not read"
            problems.append(f"{old[-1]}: {text}")
        elif not problems and (hole or len(rounds) > 1):  # the first checkpoint is written after the set-up
            problems.append(hole or f"{self.path / 'checkpoints'} is empty, but rounds.jsonl has rounds")
        if problems:
            reasons = "\n".join(f"  {problem}" for problem in problems)
            raise RunError(
                f"{shown(self.path)} cannot be resumed, and nothing in it was changed:\n{reasons}\n"
                "Restore the files from a copy, or start a new run"
            )
        return None

    def _newest(self) -> tuple[Stored | None, list[str]]:
        """Return the checkpoint to use, and the faults of the newer ones."""
        rounds, hole = scan_rounds(self.path / "rounds.jsonl")
        problems: list[str] = []
        for path in self.checkpoints():
            try:
                found = stored.read(path)
            except Damaged as error:
                problems.append(str(error))
                continue
            if found.done < len(rounds):
                return found, problems
            problems.append(f"{path}: {hole or f'rounds.jsonl ends before round {found.done}'}")
        return None, problems

    def rewind(self, found: Stored | None) -> None:
        """Go back to a checkpoint, or to before the set-up. Later rounds will run again.

        Newer checkpoints, which cannot be used, are renamed and stay.
        """
        done = found.done if found is not None else -1
        rounds, _ = scan_rounds(self.path / "rounds.jsonl")
        with self._writing(RESULT) as path, suppress(RunError):
            rounds_of = (read_mapping(path) or {}).get("rounds")
            if isinstance(rounds_of, int) and rounds_of > done:
                path.unlink()  # it will be made again, and would claim rounds that are not there
        with self._writing("checkpoints"):
            newer = [path for path in self.checkpoints() if found is None or path.name > found.path.name]
            for path in newer:
                durable.rename(path, path.with_name(f"unusable-{path.name}"))
            self.warn(
                f"{path.name} could not be used and is now unusable-{path.name}; made again from round {done}"
                for path in newer
            )
        with self._writing("rounds.jsonl") as path:
            durable.replace(path, durable.as_lines(rounds[: done + 1]))
        with self._writing("clients.parquet") as folder:
            missing = missing_rows(self.path)
            self.warn([] if missing is None else [f"{missing}: they are lost"])
            for part in sorted(folder.glob("part-*.parquet")):
                if rounds_in := _PART.fullmatch(part.stem):
                    self._rewind_part(part, int(rounds_in[1]), int(rounds_in[2]), done)
        self._unwritten = []

    def _rewind_part(self, part: Path, first: int, last: int, done: int) -> None:
        """Remove the clients' rows of rounds that will run again; set damaged files aside, with a warning."""
        if last > done:
            part.unlink()
            return
        try:
            read_table(part)
        except RunError as error:
            durable.rename(part, part.with_name(f".unusable-{part.name}"))
            self.warn([f"the clients' rows of rounds {first} to {last} are lost: {error}"])

    def rows_fault(self) -> str | None:
        """Return what is wrong with the clients' rows, which nothing can make again; None: nothing."""
        try:
            read_table(self.path / "clients.parquet")
        except RunError as error:
            return str(error)
        return missing_rows(self.path)

    def set_end_aside(self, round: int) -> None:
        """Move a finished run's results to `ended-…/` before it gets more rounds; `result.json` first."""
        names = ("result.json", "client_accuracy.parquet", "model.safetensors")
        with self._writing(f"ended-{round:06d}") as folder:
            for name in names:
                if (self.path / name).exists():
                    folder.mkdir(exist_ok=True)
                    durable.rename(self.path / name, folder / name)

    def rounds(self) -> list[dict[str, Any]]:
        """Read `rounds.jsonl`; a torn last line is left out.

        Raises:
            RunError: if a round is missing or damaged.
        """
        saved = newest_saved(self.path)
        rounds = sound_rounds(self.path / "rounds.jsonl")
        result = None
        with suppress(RunError):  # whoever needs it will say so
            result = read_mapping(self.path / RESULT)
        check_rounds(self.path, len(rounds) - 1, saved, result)
        return rounds

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        return sorted((self.path / "checkpoints").glob(f"round-*{stored.SUFFIX}"), reverse=True)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """Yield the path of a file for writing.

        Raises:
            RunError: if the disk refuses.
        """
        path = self.path / name
        check_held(self.path)
        with durable.on_disk(path, self._advice):
            yield path

    def _advice(self) -> str:
        saved = newest_saved(self.path)
        last = f" continues after round {saved}, the last checkpoint" if saved >= 0 else ""
        return f"`fedray resume {shown(self.path)}`{last}"

    def _write_rows(self) -> None:
        if not self._unwritten:
            return
        first, last = self._unwritten[0][0], self._unwritten[-1][0]
        rows = [
            {
                "round": round,
                "client": record.client,
                "device": record.device,
                "num_examples": record.num_examples,
                "fate": record.fate,
                "bytes_down": record.cost.bytes_down,
                "bytes_up": record.cost.bytes_up,
                "flops": record.cost.flops,
                "executed_flops": record.cost.executed_flops,
                "seconds": record.cost.seconds,
                "steps": record.cost.steps,
                "energy_j": record.cost.energy_j,
                "memory_bytes": record.memory_bytes,
                "density": record.density,
                "loss": record.loss,
            }
            for round, record in self._unwritten
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        with self._writing("clients.parquet") as folder:
            folder.mkdir(exist_ok=True)
            write_table(folder / f"part-{first:06d}-{last:06d}.parquet", columns)
        self._unwritten = []


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with NaN and infinity as null: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
