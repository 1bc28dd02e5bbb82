"""Whether a run can be resumed: config, checkpoint and model belong together, and only allowed keys change.

    config.yaml (as written) → overrides (of keys that may change) → checkpoint (of this config and model)

Nothing is written here. A mismatch is refused with the values that differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedray.config import sealed, yaml_text
from fedray.config.overrides import origin, override_tree, parse_overrides
from fedray.config.run_config import SINCE, RunConfig
from fedray.config.tables import TABLES
from fedray.config.trees import INDECISIVE, Tree, decisive, flat_text
from fedray.config.trust import IMPORTED, recorded
from fedray.durable import shown
from fedray.errors import ConfigError, RunError
from fedray.records import Record, Shape
from fedray.storage.checkpoint import Stored, difference
from fedray.storage.run_files import RunFiles
from fedray.types import Layout

MAY_CHANGE = ", ".join(
    f"{key} without by_device" if key == "clients.resources" else key for key in ("rounds", *INDECISIVE)
)
REGISTERED = "registered.json"
"""Table entries that this run uses, with their modules, where `imports` could not record a file."""

_REGISTERED = Record(REGISTERED, Shape(each=list), "or remove it, and import the modules that the run used")

SHOWN = 6
"""A message names at most this many differences."""


def resumed_config(
    files: RunFiles, changes: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[Tree, RunConfig]:
    """Return a run's config before and after the changes. The first may name files that have moved.

    Raises:
        ConfigError: if `changes` are not allowed.
        RunError: if `config.yaml` has changed since the run wrote it.
    """
    path = files.path / "config.yaml"
    _check_registered(files)
    problem = sealed.fault(path)
    if problem is not None:
        if not files.checkpoints():
            RunConfig.from_tree(yaml_text.load(path), str(path))  # of a sweep or a training, perhaps
        raise RunError(f"{path}: {problem}{_against_checkpoint(files)}")
    before = files.read_config()
    given = dict(changes) if isinstance(changes, Mapping) else parse_overrides(changes)
    with recorded(IMPORTED.read(files.path)):
        changed = RunConfig.from_tree(override_tree(before, given), origin(path, given))
    fixed = [f"{key} from {old} to {new}" for key, old, new in _differences(before, changed.to_tree())]
    if fixed:
        arguments = " ".join(changes) if not isinstance(changes, Mapping) else "KEY=VALUE"
        raise ConfigError(
            f"resume cannot change {_shown(fixed)}: the rounds so far were made with the old values. It can "
            f"change {MAY_CHANGE}. For a new run: fedray run {shown(path)} {arguments}"
        )
    return before, changed


def _check_registered(files: RunFiles) -> None:
    """Refuse to resume a run whose methods, models, … no importable file provides.

    Raises:
        ConfigError: with the module that had added them.
        RunError: if the file that names them is damaged.
    """
    for key, entry in (_REGISTERED.read(files.path) or {}).items():
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise RunError(
                f"{files.path / REGISTERED}: is damaged: {key} has no name and module; restore it from a "
                f"copy, {_REGISTERED.otherwise}"
            )
        name, module = entry
        if name not in TABLES.get(key, (name,)):
            raise ConfigError(
                f"{files.path}: {key} {name!r} was added by the module {module}, which a run cannot record: "
                "give a file that adds it, fedray resume --import FILE, or import it before fedray.resume"
            )


def check_origin(files: RunFiles, found: Stored, config: RunConfig, layout: Layout) -> None:
    """Refuse a checkpoint of another config or model.

    Raises:
        RunError: with the values that differ.
    """
    changed = [
        f"{key}: {old} in the checkpoint, {new} in config.yaml"
        for key, old, new in _differences(found.config, config.to_tree())
    ]
    other = difference(found.checkpoint.state.params.layout, layout)
    problem = _shown(changed) or (f"the model is another one: {other}" if other else "")
    if problem:
        raise RunError(
            f"{shown(files.path)} cannot be resumed: {problem} ({found.path.name}); put config.yaml's "
            "values back, or restore the files from a copy"
        )


def check_rounds(found: Stored, config: RunConfig) -> None:
    """Refuse another number of rounds where the completed rounds depend on it.

    Raises:
        ConfigError: with the reason, and what to do.
    """
    before, changed = int(found.config["rounds"]), config.rounds
    if before == changed:
        return
    start_anew = f"start a new run with rounds={changed}"
    if changed < found.done:
        raise ConfigError(f"rounds={changed}: {found.done} rounds are made already; {start_anew}")
    reason = config.method.options.depends_on_rounds
    if reason is None and found.checkpoint.rounds_matter:
        reason = "the method has asked how many rounds are planned (ctx.rounds)"
    if reason is None and config.norm == "static" and found.done == before and before % config.eval_every:
        reason = f"round {before} was evaluated as the last one, and norm=static changes the model there"
    if reason is not None:
        raise ConfigError(
            f"rounds={changed}: what {config.method.name} did so far was planned for {before} rounds: "
            f"{reason}; {start_anew}"
        )


def _differences(before: Tree, changed: Tree) -> Iterator[tuple[str, str, str]]:
    """Yield each decisive key but rounds that differs, with both values as text.

    A key that was added later has in older configs the value that all runs had before.
    """
    old, new = (flat_text(SINCE) | flat_text(decisive(tree)) if tree else {} for tree in (before, changed))
    for key in dict.fromkeys((*old, *new)):
        if key != "rounds" and old.get(key) != new.get(key):
            yield key, old.get(key, "absent"), new.get(key, "absent")


def _against_checkpoint(files: RunFiles) -> str:
    """Say how `config.yaml` differs from the config of the newest checkpoint, and what to do."""
    advice = f". Put them back; to change {MAY_CHANGE}: fedray resume {shown(files.path)} KEY=VALUE"
    try:
        found = files.load()
    except RunError:
        found = None
    if found is None:
        return advice
    old, new = flat_text(found.config), flat_text(yaml_text.load(files.path / "config.yaml"))
    changed = [
        f"{key}: {old.get(key, 'absent')} in the checkpoint, {new.get(key, 'absent')} in config.yaml"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]
    return f": {_shown(changed)}{advice}" if changed else advice


def _shown(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more
