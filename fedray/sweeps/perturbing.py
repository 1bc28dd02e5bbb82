"""The perturbations of PBT as a sweep's files have them: drawn once, carried out by the trials themselves.

perturbed.jsonl            a line for each perturbation: round, and who continues from whom with which options
forks/000004/<parent>/     checkpoint and rounds of a parent, until the next perturbation
"""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.config.overrides import override_tree
from fedray.config.run_config import RunConfig
from fedray.durable import append_lines
from fedray.errors import ConfigError, RunError
from fedray.experiment.forking import fork, keep, lineage
from fedray.records import Records, Shape
from fedray.sweeps.outcome import writing

if TYPE_CHECKING:
    from fedray.sweeps.pbt import Exploit

logger = logging.getLogger(__name__)

PERTURBED, FORKS = "perturbed.jsonl", "forks"

_LINES = Records(
    PERTURBED,
    {
        "round": Shape(
            {"round": int, "exploits": list},
            items={"exploits": Shape({"trial": str, "from": str, "changes": dict})},
        )
    },
    "or start another sweep",
)


def recorded(path: Path, base: RunConfig, round: int, drawn: "list[Exploit]") -> "list[Exploit]":
    """Record a perturbation and keep the parents' checkpoints; return the record if there is one already.

    Args:
        path: the sweep's directory.
        base: the config of a trial, to check the changed options.
        round: of the perturbation.
        drawn: what was drawn now.
    """
    from fedray.sweeps.pbt import Exploit

    for line in _LINES.read(path):
        if line["round"] == round:
            return [Exploit(one["trial"], one["from"], one["changes"]) for one in line["exploits"]]
    held = [exploit for exploit in drawn if _holds(path, base, round, exploit)]
    lines = [{"trial": one.trial, "from": one.parent, "changes": one.changes} for one in held]
    with writing(path / PERTURBED):
        append_lines(path / PERTURBED, [{"round": round, "exploits": lines}])
    for old in (path / FORKS).glob("*"):  # all trials have gone on from it
        if int(old.name) < round:
            shutil.rmtree(old, ignore_errors=True)
    return held


def _holds(path: Path, base: RunConfig, round: int, exploit: "Exploit") -> bool:
    """Keep the parent's checkpoint; tell whether the trial can continue from it with the changed options."""
    try:
        RunConfig.from_tree(override_tree(base.to_tree(), exploit.changes))
        folder = _kept(path, round, exploit.parent)
        if not (folder / "rounds.jsonl").exists():  # written last
            keep(path / "trials" / exploit.parent, round, folder)
    except (ConfigError, RunError) as error:
        logger.warning("%s continues by itself after round %d: %s", exploit.trial, round, error)
        return False
    return True


def fork_if_due(path: Path, name: str, patience_s: float) -> None:
    """Carry out the last perturbation of a trial, unless that is done.

    Args:
        path: the sweep's directory.
        name: of the trial.
        patience_s: seconds to wait for a process that is leaving the trial.
    """
    due = _last(path, name)
    if due is None:
        return
    round, exploit = due
    place, forks = path / "trials" / name, lineage(path / "trials" / name)
    if (forks and forks[-1]["round"] >= round) or not (_kept(path, round, exploit["from"])).exists():
        return
    fork(place, _kept(path, round, exploit["from"]), round, exploit["from"], exploit["changes"], patience_s)


def _last(path: Path, name: str) -> tuple[int, dict[str, Any]] | None:
    """Return the round and the record of a trial's last perturbation."""
    found = None
    for line in _LINES.read(path):
        for exploit in line["exploits"]:
            if exploit["trial"] == name:
                found = (line["round"], exploit)
    return found


def _kept(path: Path, round: int, parent: str) -> Path:
    return path / FORKS / f"{round:06d}" / parent
