"""Population based training over rounds (Jaderberg et al., 2017): Tune's, with a fork in place of its copy.

Tune's synchronous mode: all trials wait at every `perturb_every`-th round; then each of the worst quantile
takes a trial of the best as its parent, with perturbed options. Which one, and what it changes, depends on
the values at that round and on the seed alone, so that a resumed sweep decides alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.schedulers.pbt import _explore, _PBTTrialState

from fedray.randomness import borrowed
from fedray.sweeps.schedulers import ROUND, WORTH, Seat


@dataclass(frozen=True)
class Exploit:
    """A trial that continues from another one's model.

    Args:
        trial: its name.
        parent: name of the other one.
        changes: dotted key → value.
    """

    trial: str
    parent: str
    changes: dict[str, Any]


OnPerturb = Callable[[int, list[Exploit]], list[Exploit]]
"""Called with the round and what was drawn; returns what holds: that of an earlier session, perhaps."""


class PbtRule(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types
    """PBT.

    Args:
        every: rounds between perturbations.
        quantile: share of the trials that are worst, and best.
        resample: probability of drawing an option anew.
        mutations: key → Tune's domain, or a list of values.
        seed: of the draws.
        configs: name of a trial → key → value.
        on_perturb: called once in each perturbation.
    """

    pauses = True

    def __init__(
        self,
        *,
        every: int,
        quantile: float,
        resample: float,
        mutations: Mapping[str, Any],
        seed: int,
        configs: Mapping[str, Mapping[str, Any]],
        on_perturb: OnPerturb = lambda round, drawn: drawn,
    ) -> None:
        super().__init__(
            ROUND,
            WORTH,
            "max",
            perturbation_interval=every,
            hyperparam_mutations=dict(mutations),
            quantile_fraction=quantile,
            resample_probability=resample,
            synch=True,
        )
        self.seed, self.configs, self.on_perturb = seed, configs, on_perturb
        self.names = list(configs)
        self._drawn: list[Exploit] = []

    def may_go_on(self, seat: Seat) -> bool:
        """Tell whether a trial has not reached the next perturbation."""
        return bool(self._trial_state[seat].last_train_time < self._next_perturbation_sync)

    def on_trial_add(self, tune_controller: Any, trial: Seat) -> None:
        """Add a trial; one that is tried again joins at the next perturbation."""
        trial.config = trial.config or dict(self.configs[trial.name])
        state = _PBTTrialState(trial)
        state.last_perturbation_time = self._next_perturbation_sync - self._perturbation_interval
        self._trial_state[trial] = state

    def on_trial_result(self, tune_controller: Any, trial: Seat, result: dict[str, Any]) -> str:
        """Let a trial wait at the perturbation; perturb when it is the last to arrive."""
        before, self._drawn = self._next_perturbation_sync, []
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if self._drawn and self._next_perturbation_sync > before:
            self._perturb(tune_controller, int(result[ROUND]))
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Seat, result: Mapping[str, Any]) -> None:
        """Go on without a trial that the others may have waited for."""
        live = tune_controller.get_live_trials()
        states = [self._trial_state[seat] for seat in live]
        if live and all(state.last_train_time >= self._next_perturbation_sync for state in states):
            self.on_trial_result(tune_controller, live[-1], states[-1].last_result)

    def on_trial_error(self, tune_controller: Any, trial: Seat) -> None:
        """Go on without a trial that failed."""
        self.on_trial_complete(tune_controller, trial, {})

    def _checkpoint_or_exploit(
        self, trial: Seat, tune_controller: Any, upper_quantile: list[Seat], lower_quantile: list[Seat]
    ) -> None:
        """Draw a parent and changes for a trial of the worst quantile."""
        if trial not in lower_quantile:
            return
        round = int(self._trial_state[trial].last_train_time)
        with borrowed(self.seed, round, self.names.index(trial.name)):
            import random

            parent = random.choice(upper_quantile)
            changed, _ = _explore(
                parent.config,
                self._hyperparam_mutations,
                self._resample_probability,
                self._perturbation_factors,
                None,
            )
        changes = {key: _within(value, self._hyperparam_mutations[key]) for key, value in changed.items()}
        self._drawn.append(Exploit(trial.name, parent.name, changes))

    def _perturb(self, desk: Any, round: int) -> None:
        seats = {seat.name: seat for seat in desk.get_trials()}
        for exploit in self.on_perturb(round, self._drawn):
            seats[exploit.trial].config = dict(exploit.changes)


def _within(value: Any, domain: Any) -> Any:
    """Return a perturbed value within the bounds of its domain, as a plain number."""
    value = value.item() if hasattr(value, "item") else value
    lower, upper = getattr(domain, "lower", None), getattr(domain, "upper", None)
    return value if lower is None or upper is None else min(max(value, lower), upper)
