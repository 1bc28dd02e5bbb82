"""The frameworks that are measured, and how the process of each is started."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.environments import HERE, python_of
from benchmarks.peers.session import ROOT

QUIET = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Framework:
    """A framework.

    Args:
        title: its row in the table.
        arguments: those of `benchmarks.peers.inside`: the module, and what it takes after the folder.
        requirements: its pinned versions; None: it runs in our own environment.
        environ: variables of its process.
    """

    title: str
    arguments: tuple[str, ...]
    requirements: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: QUIET)

    def command(self, folder: Path, environments: Path) -> list[str]:
        """Return the command of its process; makes its environment if necessary.

        Raises:
            NotInstalledError: if its environment cannot be made.
        """
        python = python_of(self.requirements, environments) if self.requirements else sys.executable
        module, *rest = self.arguments
        return [str(python), "-m", "benchmarks.peers.inside", module, str(folder), *rest]


def _peer(title: str, module: str) -> Framework:
    return Framework(title, (module,), HERE / f"{module}.txt")


def _ours(contender: str) -> Framework:
    return Framework(contender, ("ours", contender))


PLAIN, FLOWER = "plain", "flower"
FRAMEWORKS = {
    FLOWER: _peer("Flower, 2 Ray workers", "flower"),
    "pfl": _peer("pfl-research, 1 process", "pfl_research"),
    "fluke": _peer("fluke, 1 process", "fluke_fedavg"),
    PLAIN: _ours("plain loop, 1 process"),
    "plain-2": _ours("plain loop, 2 processes"),
    "fedray": _ours("fedray, in process"),
    "fedray-ray": _ours("fedray, Ray, 2 actors"),
}
"""Name on the command line → framework."""
