"""A fork: a run continues from a checkpoint of another run, with changed options, and says so.

    lineage.jsonl        a line for each fork: round, parent, changed options, what the run spent before
    before-000004/       what the run had made until its fork after round 4

From then on the run's rounds, bytes and totals are those of its parent up to the fork, and its own after it.
What it spent itself before stands in `spent`, so that the compute of several runs can be added up.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedray.config import sealed
from fedray.config.overrides import override_tree
from fedray.config.run_config import RunConfig
from fedray.config.trees import Tree
from fedray.durable import append_lines, as_lines, on_disk, rename, scan_lines, shown
from fedray.durable import replace as replace_file
from fedray.errors import RunError
from fedray.records import Records, Shape
from fedray.storage import checkpoint as stored
from fedray.storage.directory import Lock
from fedray.storage.run_files import RESULT, RunFiles

LINEAGE = "lineage.jsonl"
"""File of a run that was forked: its parents."""

_LINES = Records(
    LINEAGE,
    {
        "round": Shape(
            {"round": int, "from": str, "changes": dict, "spent": dict},
            inside={"spent": Shape(each=float)},
        )
    },
    "or start another sweep",
)

MOVED = ("checkpoints", "rounds.jsonl", "clients.parquet", "mlflow.json", "warnings.txt", "client_errors.txt")
"""What a fork sets aside: the run's own past, and its run in MLflow, which has other rounds."""

_PAST = re.compile(r"before-([0-9]{6,18})")

COPIED = "clients.parquet"


def keep(run: Path, round: int, folder: Path) -> None:
    """Keep what another run needs to continue from a run after a round. No file is copied where links work.

    Args:
        run: the run's directory.
        round: a complete round with a checkpoint.
        folder: where it is kept.

    Raises:
        RunError: if there is no such checkpoint.
    """
    found = run / "checkpoints" / stored.name_of(round + 1)
    if not found.is_file():
        raise RunError(
            f"{shown(run)} has no checkpoint after round {round}, from which another run could continue"
        )
    shutil.rmtree(folder, ignore_errors=True)  # of a process that died here
    (folder / COPIED).mkdir(parents=True)
    _link(found, folder / found.name)
    for part in sorted((run / COPIED).glob("part-*.parquet")):
        if int(part.stem.split("-")[2]) <= round:
            _link(part, folder / COPIED / part.name)
    replace_file(folder / "rounds.jsonl", as_lines(RunFiles(run).rounds()[: round + 1]))


def lineage(run: Path) -> list[Tree]:
    """Return the forks of a run, in order.

    Raises:
        RunError: if the file is damaged, or a fork is missing in it.
    """
    forks = _LINES.read(run)
    sets_aside = {int(found[1]) for past in run.glob("before-*") if (found := _PAST.fullmatch(past.name))}
    missing = sorted(sets_aside - {entry["round"] for entry in forks})
    # a process that died in a fork leaves the newest without its line: the next call does the rest
    if len(missing) > 1 or (missing and (missing[0] < max(sets_aside) or (run / RESULT).exists())):
        raise RunError(
            f"{run / LINEAGE}: is damaged: the fork after round {missing[0]} is missing; restore it from a "
            f"copy, {_LINES.otherwise}"
        )
    return forks


def spent(run: Path) -> dict[str, float]:
    """Return the totals of what a run has made itself: without its parents' rounds, with those set aside."""
    rounds, forks = RunFiles(run).rounds(), lineage(run)
    own = _since(rounds, forks[-1]["round"] if forks else None)
    for entry in forks:
        own = {name: own.get(name, 0.0) + value for name, value in entry["spent"].items()}
    return own


def fork(
    run: Path, kept: Path, round: int, parent: str, changes: Mapping[str, Any], patience_s: float = 0.0
) -> None:
    """Let a run continue from what `keep` kept. Does nothing if it does so already.

    A process that dies here leaves the run without its new line in the lineage: the next call does the rest.

    Args:
        run: directory of the run.
        kept: folder written by `keep`.
        round: of the fork.
        parent: name of the other run.
        changes: dotted key → value; all else of the config is the parent's.
        patience_s: seconds to wait for a process that is leaving the run.

    Raises:
        ConfigError: if the changed config cannot run.
        RunError: if the kept files are gone.
    """
    with Lock(run, patience_s=patience_s), on_disk(run / LINEAGE):
        forks = lineage(run)
        if forks and forks[-1]["round"] >= round:
            return
        found = stored.read(kept / stored.name_of(round + 1))
        past = run / f"before-{round:06d}"
        before = found.config
        config = RunConfig.from_tree(override_tree(before, changes), parent).to_tree()
        past.mkdir(exist_ok=True)
        for name in MOVED:
            if (run / name).exists() and not (past / name).exists():
                rename(run / name, past / name)
        (run / "checkpoints").mkdir(exist_ok=True)
        shutil.copytree(kept / COPIED, run / COPIED, dirs_exist_ok=True)
        replace_file(run / "rounds.jsonl", (kept / "rounds.jsonl").read_bytes())
        stored.write(run / "checkpoints" / stored.name_of(round + 1), found.checkpoint, config)
        sealed.write(run / "config.yaml", config)
        own = _since(scan_lines(past / "rounds.jsonl")[0], forks[-1]["round"] if forks else None)
        changed = {key: [_value(before, key), value] for key, value in changes.items()}
        entry = {"round": round, "from": parent, "changes": changed, "spent": own}
        append_lines(run / LINEAGE, [entry])


def _since(rounds: list[Tree], fork: int | None) -> dict[str, float]:
    """Return the totals of rounds after a fork; None: of all rounds."""
    if not rounds:
        return {}
    last, first = rounds[-1]["metrics"], rounds[fork]["metrics"] if fork is not None else {}
    return {name: last[name] - first.get(name, 0.0) for name in last if name.startswith("total/")}


def _value(tree: Tree, key: str) -> Any:
    found: Any = tree
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _link(file: Path, to: Path) -> None:
    try:
        to.hardlink_to(file)
    except OSError:  # no links here
        shutil.copy2(file, to)
