"""The files of a run, written so that a crash at any moment leaves a directory to read, and to go on from.

    config.yaml              the whole config, defaults included
    rounds.jsonl             one line a round; only the last line can be torn
    clients.parquet/         a row per client and round, in part files written at each checkpoint
    client_accuracy.parquet  the final model on each client's own examples
    checkpoints/             the newest two; the older one is for a crash while the newer is written
    model.safetensors        the final model, by name
    result.json              every final metric under its name, `weights_sha256`, `status`: written last
    warnings.txt, mlflow.json   if there is something to say

Whatever is not appended to is written beside its place and renamed.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedray.errors import ConfigError, RunError
from fedray.experiment import yaml
from fedray.federation.server import Checkpoint
from fedray.types import ClientRecord, Params, RoundReport

KEPT_CHECKPOINTS = 2


class RunFiles:
    """One run's directory.

    Args:
        path: the directory; use `create` for a new one, `open` for one that is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[tuple[int, ClientRecord]] = []

    @classmethod
    def create(cls, path: Path) -> "RunFiles":
        """Make a directory that no other run has, or take an empty one.

        Raises:
            ConfigError: if there is something in it.
        """
        check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir()  # fails for the second of two runs that start at once
        except FileExistsError:
            raise ConfigError(f"{path} is another run's directory: choose a new one with --out") from None
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be made: {error.strerror}; choose another with --out"
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFiles":
        """Open the directory of an earlier run.

        Raises:
            ConfigError: if it is not one.
        """
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is not the directory of a run: it has no config.yaml")
        return cls(path)

    # ── while the run goes on
    # ────────────────────────────────────────────────────────────────────────────────

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Write `config.yaml`."""
        _replace(self.path / "config.yaml", yaml.dump(dict(tree)).encode())

    def read_config(self) -> dict[str, Any]:
        """Read `config.yaml`."""
        return yaml.load(self.path / "config.yaml")

    def append(self, report: RoundReport) -> None:
        """Add a round, and see it onto the disk; its client records wait for the next checkpoint."""
        line = {"round": report.round, "metrics": _plain(report.metrics), "notes": list(report.notes)}
        with open(self.path / "rounds.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._unwritten += [(report.round, record) for record in report.clients]

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the clients' rows so far and a checkpoint; keep the newest two."""
        self._write_rows()
        path = self.path / "checkpoints" / f"round-{checkpoint.state.round:06d}.pt"
        partial = path.with_suffix(".writing")
        torch.save(checkpoint, partial)
        _commit(partial, path)
        for old in self._checkpoints()[KEPT_CHECKPOINTS:]:
            old.unlink()

    def warn(self, warnings: Iterable[str]) -> None:
        """Record what a reader of the run should know."""
        text = "".join(f"{warning}\n" for warning in warnings)
        if text:
            with open(self.path / "warnings.txt", "a", encoding="utf-8") as file:
                file.write(text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        _replace(self.path / name, (json.dumps(_plain(value), indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file; None if it is not there."""
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return value

    # ── at its end
    # ───────────────────────────────────────────────────────────────────────────────────────────

    def write_model(self, params: Params) -> Path:
        """Write `model.safetensors`, tensors by name."""
        from safetensors.torch import save

        path = self.path / "model.safetensors"
        _replace(path, save({name: tensor.contiguous() for name, tensor in params.items()}))
        return path

    def write_client_accuracy(self, rows: Mapping[str, Any]) -> None:
        """Write `client_accuracy.parquet` from columns."""
        self._write_parquet(self.path / "client_accuracy.parquet", rows)

    # ── going on
    # ─────────────────────────────────────────────────────────────────────────────────────────────

    def load(self) -> Checkpoint | None:
        """Read the newest checkpoint that can be read; None if there is none.

        A checkpoint is a pickle: only resume directories that you trust.
        """
        for path in self._checkpoints():
            try:
                checkpoint = torch.load(path, weights_only=False)
            except Exception as error:
                self.warn(
                    [f"{path.name} cannot be read ({type(error).__name__}); going back to the one before"]
                )
                continue
            if not isinstance(checkpoint, Checkpoint):
                raise RunError(f"{path} holds {type(checkpoint).__name__}, not a checkpoint of a run")
            return checkpoint
        return None

    def rewind(self, round: int) -> None:
        """Forget what was written after `round`: those rounds are made again."""
        rounds = [line for line in self.rounds() if line["round"] <= round]
        text = "".join(json.dumps(line) + "\n" for line in rounds)
        _replace(self.path / "rounds.jsonl", text.encode())
        for part in (self.path / "clients.parquet").glob("part-*.parquet"):
            if int(part.stem.split("-")[2]) > round:
                part.unlink()
        self._unwritten = []

    def rounds(self) -> list[dict[str, Any]]:
        """Read `rounds.jsonl`; a torn last line is left out."""
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        parsed = []
        for number, line in enumerate(lines, start=1):
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError:
                if number < len(lines):
                    raise RunError(f"{path}, line {number}: not JSON, and not the last line") from None
        return parsed

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*.pt"), reverse=True)

    def _write_rows(self) -> None:
        if not self._unwritten:
            return
        first, last = self._unwritten[0][0], self._unwritten[-1][0]
        folder = self.path / "clients.parquet"
        folder.mkdir(exist_ok=True)
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
                "density": record.density,
                "loss": record.loss,
            }
            for round, record in self._unwritten
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self._write_parquet(folder / f"part-{first:06d}-{last:06d}.parquet", columns)
        self._unwritten = []

    def _write_parquet(self, path: Path, columns: Mapping[str, Any]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        partial = path.with_name(f".{path.name}.writing")  # hidden: a reader of the folder passes over it
        parquet.write_table(pa.table(dict(columns)), partial)
        _commit(partial, path)


def check_free(path: Path) -> None:
    """Raise ConfigError if a run cannot have `path` for itself; writes nothing."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{path} is not empty: a run needs a directory of its own; choose a new one with --out"
        )


def numbered(folder: Path, stem: str) -> Path:
    """Return the first of `folder/stem-001`, `-002`, … that does not exist; creates nothing."""
    number = 1
    while (path := folder / f"{stem}-{number:03d}").exists():
        number += 1
    return path


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with NaN and infinity as null: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.writing")
    partial.write_bytes(data)
    _commit(partial, path)


def _commit(partial: Path, path: Path) -> None:
    """Put a finished file in its place, contents first."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
