"""Whether population based training can perturb what `tune.scheduler.mutations` names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedray.config.run_config import RunConfig
from fedray.config.schedulers import Pbt
from fedray.errors import nearest

HERE = "tune.scheduler"


def pbt_problems(
    options: Pbt, configs: Sequence[RunConfig], changes: Sequence[Mapping[str, Any]], every: int
) -> Iterator[tuple[str, str]]:
    """Yield why the points cannot be a population.

    Args:
        options: of the scheduler.
        configs: of the points.
        changes: of the points.
        every: rounds between evaluations that all points share.
    """
    if not options.mutations:
        example = "{method.lr: {loguniform: [0.01, 0.3]}}"
        yield f"{HERE}.mutations", f"missing; name what is perturbed, e.g. {example}"
    if len(configs) < 2:
        yield HERE, "pbt needs two trials or more, of which one continues from another"
    for key in options.mutations:
        yield from dict.fromkeys(_key_problems(key, configs))
    others = sorted({key for change in changes for key in change} - set(options.mutations))
    if others:
        text = f"pbt copies a trial's whole config to another: all trials have the same {', '.join(others)}"
        yield f"space.{others[0]}", f"{text}; set it in base, or add it to {HERE}.mutations"
    yield from _interval_problems(options.perturb_every, configs, every)


def _key_problems(key: str, configs: Sequence[RunConfig]) -> Iterator[tuple[str, str]]:
    section, _, option = key.partition(".")
    for name, method in ((config.method.name, config.method.options) for config in configs):
        allowed = [f"method.{known}" for known in sorted(method.may_change)]
        if section != "method" or option not in method.may_change:
            text = f"cannot change in a running {name}{nearest(key, allowed)} It can change"
            yield f"{HERE}.mutations.{key}", f"{text} {', '.join(allowed)}"
        elif getattr(method, option) is None:
            yield (
                f"{HERE}.mutations.{key}",
                f"{key} is null; give it a value in base or space",
            )


def _interval_problems(interval: int, configs: Sequence[RunConfig], every: int) -> Iterator[tuple[str, str]]:
    shortest = min(config.rounds for config in configs)
    saved = max(config.checkpoint_every for config in configs)
    if interval >= shortest:
        text = f"{interval} is not below the {shortest} rounds of a trial, so that nothing is perturbed"
        yield f"{HERE}.perturb_every", text
    elif interval % every:
        text = f"got {interval}, but rounds are evaluated every {every} (eval_every); take a multiple of it"
        yield f"{HERE}.perturb_every", text
    elif interval % saved:
        text = f"got {interval}, and trials continue from checkpoints, but checkpoint_every={saved}: set "
        yield f"{HERE}.perturb_every", f"{text}checkpoint_every={interval} in base, or another divisor of it"
