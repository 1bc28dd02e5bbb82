"""Runs of a fraction of a second: digits, a small network, six clients in process, nothing tracked."""

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedray.config.overrides import override_tree
from fedray.config.run_config import RunConfig
from fedray.config.trees import Tree
from fedray.data import Examples
from fedray.durable import read_lines, read_mapping
from fedray.federation.client import Outcome
from fedray.federation.pool import LocalPool
from fedray.federation.worker import Workplace
from fedray.models import build_model
from fedray.types import RoundReport, Task

ROUNDS = 3
TREE: Tree = {
    "rounds": ROUNDS,
    "checkpoint_every": 2,
    "model": "mlp",
    "data": {"name": "digits"},
    "clients": {"population": 6, "cohort": 3, "actors": 0},
    "method": {"name": "fedavg", "batch_size": 50},
    "tracking": {"uri": "none"},
}
"""Checkpoints are written after the set-up and after rounds 2 and 3."""


def config(changes: Mapping[str, Any] | None = None, /, **more: Any) -> RunConfig:
    """Return the config of a tiny run, with dotted keys changed."""
    return RunConfig.from_tree(override_tree(TREE, dict(changes or {}) | more))


def model_sha256(path: Path) -> str:
    """Return the SHA-256 of the tensors of `model.safetensors`, one after the other as the mlp has them."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    layout = build_model("mlp", (1, 8, 8), 10).layout
    assert set(tensors) == set(layout.names)
    return sha256(b"".join(tensors[name].astype("<f4").tobytes() for name in layout.names)).hexdigest()


def listing(folder: Path) -> list[str]:
    """Return all that lies below a folder, by relative name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def figures(path: Path) -> dict[str, Any]:
    """Return all that must be equal of two runs of one config: everything but wall time."""
    import pandas as pd

    rounds, result = read_lines(path / "rounds.jsonl"), read_mapping(path / "result.json") or {}
    for metrics in (result, *(line["metrics"] for line in rounds)):
        for clock in [name for name in metrics if name.endswith("wall_s")]:
            del metrics[clock]
    clients = pd.read_parquet(path / "clients.parquet").to_dict("records")
    return {
        "rounds": rounds,
        "result": result,
        "clients": clients,
        "model": model_sha256(path / "model.safetensors"),
    }


def ending(round: int, error: type[BaseException]) -> Callable[[RoundReport], None]:
    """Return an `on_round` that raises after a round."""

    def on_round(report: RoundReport) -> None:
        if report.round == round:
            raise error(f"after round {round}")

    return on_round


class Watched(LocalPool):
    """A pool that keeps what it was made for, and what it classified."""

    def __init__(self, place: Workplace, log: list[Any]) -> None:
        super().__init__(place)
        self.log = log
        log.append(place)

    def evaluate(self, task: Task, examples: Examples) -> Outcome:
        """Classify examples, and remember which."""
        self.log.append(examples)
        return super().evaluate(task, examples)
