"""Which runs a list shows, and in which order: `method=staged`, `val/accuracy>0.8`, `--sort bytes`."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fedray.config import yaml_text
from fedray.errors import ConfigError, nearest
from fedray.overview.summary import Status, Summary

SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
"""Sign of a condition → comparison."""


@dataclass(frozen=True)
class Condition:
    """One condition on a value of a run, e.g. `method=staged`.

    Args:
        key: a column, a dotted key of the config, or a metric.
        sign: of `SIGNS`.
        wanted: the value beside the sign.
    """

    key: str
    sign: str
    wanted: Any

    @classmethod
    def of(cls, text: str) -> "Condition":
        """Read `KEY<sign>VALUE`.

        Raises:
            ConfigError: if it has no sign, or no key.
        """
        parts = re.match(r"\s*([^<>=!\s]+)\s*(>=|<=|!=|==|>|<|=)\s*(.*?)\s*$", text)
        if parts is None:
            raise ConfigError(
                f"--where {text!r} is not of the form KEY=VALUE, e.g. method=staged or 'val/accuracy>0.8'; "
                f"signs: {', '.join(SIGNS)}"
            )
        key, sign, value = parts.groups()
        return cls(key, sign, yaml_text.parse(value, f"--where {text}"))

    def holds(self, run: Summary) -> bool:
        """Tell whether a run fulfils it. A missing value equals nothing, and is neither more nor less."""
        found = run.value(self.key)
        if found is None:
            return (self.sign == "!=") != (self.wanted is None) if self.sign in ("=", "==", "!=") else False
        if _is_number(found) and _is_number(self.wanted):
            return SIGNS[self.sign](found, self.wanted)
        return SIGNS[self.sign](_text(found), _text(self.wanted))


def select(
    runs: Sequence[Summary],
    where: Iterable[str] = (),
    status: Iterable[str] = (),
    sort: str | None = None,
    reverse: bool = False,
) -> list[Summary]:
    """Return the runs that fulfil all conditions.

    Args:
        runs: all runs.
        where: conditions.
        status: any of these; none: all.
        sort: a key; None: as given. Runs without the value come last.
        reverse: whether the greatest value comes first.

    Raises:
        ConfigError: for a key that no run has, or a status that there is not.
    """
    conditions = [Condition.of(text) for text in where]
    allowed, wanted = get_args(Status), list(status)
    for word in wanted:
        if word not in allowed:
            raise ConfigError(
                f"--status: unknown status {word!r}{nearest(word, allowed)} Known: {', '.join(allowed)}"
            )
    check_keys(runs, [condition.key for condition in conditions], "--where")
    check_keys(runs, [] if sort is None else [sort], "--sort")
    kept = [
        run
        for run in runs
        if all(condition.holds(run) for condition in conditions) and (not wanted or run.status in wanted)
    ]
    return kept if sort is None else _sorted(kept, sort, reverse)


def check_keys(runs: Iterable[Summary], keys: Sequence[str], option: str) -> None:
    """Refuse a key that no run has.

    Raises:
        ConfigError: with the nearest key.
    """
    if not keys:
        return
    known = dict.fromkeys(key for run in runs for key in run.known())
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"{option}: no run has {key!r}{nearest(key, known)} A key is a column, a dotted key of the "
                "config (method.lr) or a metric (val/accuracy)"
            )


def _sorted(runs: list[Summary], key: str, reverse: bool) -> list[Summary]:
    there = [run for run in runs if run.value(key) is not None]
    numbers = all(_is_number(run.value(key)) for run in there)
    there.sort(
        key=lambda run: run.value(key) if numbers else _natural(_text(run.value(key))), reverse=reverse
    )
    return there + [run for run in runs if run.value(key) is None]


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", text)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
