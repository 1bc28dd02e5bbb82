"""Points that are drawn before a sweep starts: grids, random points, first points, seeds, and trial draws."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from fedray.config.messages import Where, line, shortened
from fedray.config.overrides import SECTIONS
from fedray.config.schedulers import SCHEDULER, Pbt
from fedray.config.searches import Grid
from fedray.config.trees import Tree
from fedray.config.tune_config import VERBS, TuneConfig
from fedray.errors import ConfigError, nearest, unknown
from fedray.experiment.cluster import import_ray

WHOLE = ("randint", "qrandint", "lograndint")
"""Verbs that draw whole numbers."""

INSIDE = 1e-6
"""A draw at the end of a continuous range is this share of the range inside it."""


def points_of(space: Mapping[str, Any], tune: TuneConfig, where: Where) -> list[Tree]:
    """Return the points that a sweep without a searcher tries: the first points, the drawn ones, each seed.

    Raises:
        ConfigError: for a verb that there is not, arguments it does not take, or a first point outside space.
    """
    check_repeat(space, tune, where)
    check_first(space, tune, where)
    is_grid = isinstance(tune.search.options, Grid)
    drawn = expand(space, tune, where) if is_grid else random_points(space, tune.num_samples, tune, where)
    first = [dict(point) for point in tune.points_to_evaluate]
    return [seeded for point in [*first, *drawn] for seeded in with_seeds(point, tune)]


def with_seeds(point: Tree, tune: TuneConfig) -> list[Tree]:
    """Return a point for each seed of `tune.repeat`; the point itself if there are none."""
    return [{**point, "seed": seed} for seed in tune.repeat] or [point]


def random_points(space: Mapping[str, Any], count: int, tune: TuneConfig, where: Where) -> list[Tree]:
    """Return points, each key of which is drawn at random; a grid counts as a choice."""
    domains = {}
    for key, spec in space.items():
        verb, arguments = verb_of(key, spec, where)
        domains[key] = _domain(key, "choice" if verb == "grid" else verb, arguments, where)
    random = np.random.RandomState(tune.seed)
    return [
        {key: _plain(domain.sample(random_state=random)) for key, domain in domains.items()}
        for _ in range(count)
    ]


def extremes(verb: str, arguments: Sequence[Any]) -> list[Any]:
    """Return the values that are tried before a sweep starts: all of a list, the ends of a range."""
    if verb in ("grid", "choice"):
        return list(arguments)
    low, high = arguments[0], arguments[1]
    if verb == "randn":
        return [low]
    if verb in ("randint", "lograndint"):
        return [low, high - 1]
    inside = INSIDE * (high - low)
    return [low, high] if verb.startswith("q") else [low + inside, high - inside]


def check_drawable(space: Mapping[str, Any], tune: TuneConfig, where: Where) -> None:
    """Refuse a space that the searcher cannot draw, and first points outside it.

    Raises:
        ConfigError: with each such key.
    """
    name, cannot = tune.search.name, tune.search.options.cannot_draw
    verbs = {key: verb_of(key, spec, where)[0] for key, spec in space.items()}
    problems = [
        line(
            f"space.{key}.{verb}",
            f"{name} cannot draw {verb}; it draws {', '.join(sorted(set(VERBS) - set(cannot)))}",
            where,
        )
        for key, verb in verbs.items()
        if verb in cannot
    ]
    if not space:
        problems.append(line("tune.search", f"{name}, but space has no key that it could change", where))
    if problems:
        raise ConfigError("\n".join(problems))
    random_points(space, 1, tune, where)  # refuses arguments that a verb does not take
    check_repeat(space, tune, where)
    check_first(space, tune, where)


def check_repeat(space: Mapping[str, Any], tune: TuneConfig, where: Where) -> None:
    """Refuse seeds that are given twice.

    Raises:
        ConfigError: if `space` has seeds beside `tune.repeat`.
    """
    if tune.repeat and "seed" in space:
        text = f"{list(tune.repeat)}, but space.seed has seeds too; leave one of them out"
        raise ConfigError(line("tune.repeat", text, where))


def check_first(space: Mapping[str, Any], tune: TuneConfig, where: Where) -> None:
    """Refuse first points that are outside the space.

    Raises:
        ConfigError: with every problem of every point.
    """
    problems = [
        line(f"tune.points_to_evaluate.{number}", text, where)
        for number, point in enumerate(tune.points_to_evaluate)
        for text in _outside(point, space, where)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _outside(point: Mapping[str, Any], space: Mapping[str, Any], where: Where) -> Iterator[str]:
    for key in sorted(set(point) - set(space)):
        yield f"space has no {key!r}{nearest(key, space)} Keys of space: {', '.join(sorted(space))}"
    for key in sorted(set(space) - set(point)):
        yield f"lacks {key}; a point gives every key of space: {', '.join(sorted(space))}"
    for key in sorted(set(space) & set(point)):
        verb, arguments = verb_of(key, space[key], where)
        if verb not in ("grid", "choice"):
            _domain(key, verb, arguments, where)  # refuses arguments that the verb does not take
        if not _is_inside(point[key], verb, arguments):
            yield f"{key}={shortened(point[key])} is outside {{{verb}: {shortened(arguments)}}} of space"


def _is_inside(value: Any, verb: str, arguments: Sequence[Any]) -> bool:
    if verb in ("grid", "choice"):
        return value in arguments
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if verb == "randn":
        return True
    if verb in WHOLE and not isinstance(value, int):
        return False
    if verb.startswith("q") and not _is_multiple(value, arguments[2]):
        return False
    low, high = arguments[0], arguments[1]
    return bool(low <= value < high if verb in ("randint", "lograndint") else low <= value <= high)


def _is_multiple(value: float, step: float) -> bool:
    try:
        return abs(value / step - round(value / step)) <= 1e-9
    except (ArithmeticError, ValueError):  # no step, or an infinite value
        return False


def expand(space: Mapping[str, Any], tune: TuneConfig, where: Where) -> list[Tree]:
    """Return the points of a space: the product of its grids, random verbs are drawn in each.

    Raises:
        ConfigError: for a verb that there is not, or arguments it does not take.
    """
    grids: dict[str, list[Any]] = {}
    domains: dict[str, Any] = {}
    for key, spec in space.items():
        verb, arguments = verb_of(key, spec, where)
        if verb == "grid":
            grids[key] = arguments
        else:
            domains[key] = _domain(key, verb, arguments, where)
    random = np.random.RandomState(tune.seed)
    points = []
    for _ in range(tune.num_samples if domains else 1):
        for values in product(*grids.values()):
            drawn = {key: _plain(domain.sample(random_state=random)) for key, domain in domains.items()}
            points.append(dict(zip(grids, values, strict=True)) | drawn)
    return points


def mutations_of(options: Pbt, where: Where) -> dict[str, Any]:
    """Return Tune's domain, or the list of values, of each option that PBT perturbs.

    Raises:
        ConfigError: for a verb that there is not, or arguments it does not take.
    """
    found: dict[str, Any] = {}
    for key, spec in options.mutations.items():
        dotted = f"{SCHEDULER.section}.mutations.{key}"
        verb, arguments = verb_of(key, spec, where, dotted)
        is_list = verb in ("grid", "choice")
        found[key] = list(arguments) if is_list else _domain(key, verb, arguments, where, dotted)
    return found


def verb_of(key: str, spec: Any, where: Where, dotted: str = "") -> tuple[str, list[Any]]:
    """Return the verb and its list; `dotted` is the key for messages, by default in `space`."""
    dotted = dotted or f"space.{key}"
    inner = _dotted(key, spec)
    if inner:
        text = f"got {shortened(spec)}; write the key with its dots: {', '.join(inner)}"
        raise ConfigError(line(dotted, text, where))
    if not isinstance(spec, Mapping) or len(spec) != 1:
        example = shortened(spec) if isinstance(spec, list) and spec else "[1, 2]"
        text = f"got {shortened(spec)}; write one verb and its list, e.g. {{grid: {example}}}"
        raise ConfigError(line(dotted, text, where))
    ((verb, arguments),) = spec.items()
    if verb not in VERBS:
        raise ConfigError(line(dotted, unknown("verb", str(verb), VERBS), where))
    if not isinstance(arguments, list) or not arguments:
        text = f"got {shortened(arguments)}; must be a list with something in it"
        raise ConfigError(line(f"{dotted}.{verb}", text, where))
    return verb, arguments


def _dotted(key: str, spec: Any) -> list[str]:
    """Return the entries of a key of `space` that is a section, as `sweep.yaml` stores them."""
    found = []
    for name, inner in spec.items() if isinstance(spec, Mapping) and not set(spec) & set(VERBS) else ():
        dotted = f"{key}.{name}"
        if isinstance(inner, Mapping) and len(inner) == 1 and set(inner) <= set(VERBS):
            ((verb, arguments),) = inner.items()
            found.append(f"{dotted}: {{{verb}: {shortened(arguments)}}}")
        elif isinstance(inner, Mapping):
            found += _dotted(dotted, inner)
        elif isinstance(inner, list) and inner and key in SECTIONS:
            found.append(f"{dotted}: {{grid: {shortened(inner)}}}")
    return found


def _domain(key: str, verb: str, arguments: list[Any], where: Where, dotted: str = "") -> Any:
    """Return the domain of Tune, after one trial draw."""
    import_ray()
    from ray import tune

    try:
        domain = getattr(tune, verb)(*([arguments] if verb == "choice" else arguments))
        domain.sample(random_state=np.random.RandomState(0))  # some arguments are refused only here
    except Exception as error:
        text = f"got {shortened(arguments)}; {verb} does not take that: {error}"
        raise ConfigError(line(f"{dotted or f'space.{key}'}.{verb}", text, where)) from None
    return domain


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
