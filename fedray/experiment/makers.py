"""Which processors and versions made a run: `made_by.json`, with an entry for each that differs.

    {"processes": [{"from_round": 0, "processor": …, "torch": …, "commit": …}, …]}

Sums are rounded differently on another processor, so a result is only repeated bit by bit on the same kind.
"""

import logging
from typing import Any

from fedray.errors import RunError
from fedray.storage.run_files import RunFiles
from fedray.tracking.provenance import machine

logger = logging.getLogger(__name__)

MADE_BY = "made_by.json"


def note_maker(files: RunFiles, done: int) -> None:
    """Record that this process makes the rounds after round `done`; -1: the set-up (round 0), too.

    Entries of rounds that will be made again are dropped. A damaged file is replaced, with a warning.
    """
    try:
        known = makers(files)
    except RunError as error:
        logger.warning("%s; processors of the earlier rounds are unknown", error)
        known = []
    kept = [entry for entry in known if entry["from_round"] <= done]
    if not kept and done >= 0:
        kept = [{"from_round": 0, "processor": "unknown"}]
    mine = machine()
    if not kept or {key: value for key, value in kept[-1].items() if key != "from_round"} != mine:
        kept.append({"from_round": done + 1, **mine})
    if kept != known:
        files.write_json(MADE_BY, {"processes": kept})


def makers(files: RunFiles) -> list[dict[str, Any]]:
    """Return the entries of a run, in the order of its rounds; none where an earlier version made it.

    Raises:
        RunError: if the file is damaged.
    """
    found = (files.read_json(MADE_BY) or {}).get("processes", [])
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and type(entry.get("from_round")) is int for entry in found
    ):
        raise RunError(f"{files.path / MADE_BY}: is damaged: it lists no processes")
    return found
