"""HyperBand over rounds: the trials of a bracket wait at each rung for the others.

Tune's own, in its order: the first bracket runs all its trials to the end, the next ones begin with more
trials and fewer rounds. Which trials a rung keeps depends on their values at it alone, not on who came first.
"""

from typing import Any

from ray.tune.schedulers import HyperBandScheduler

from fedray.sweeps.schedulers import ROUND, WORTH, Seat


class HyperBandRule(HyperBandScheduler):  # type: ignore[misc]  # Ray has no types
    """HyperBand.

    Args:
        last: round of the longest trial.
        reduction: one trial in this many is kept at each rung.
    """

    pauses = True

    def __init__(self, *, last: int, reduction: int) -> None:
        # Tune's rungs are whole numbers, and the last may lie before the last round
        super().__init__(ROUND, WORTH, "max", max_t=last, reduction_factor=reduction, stop_last_trials=False)

    def may_go_on(self, seat: Seat) -> bool:
        """Tell whether a paused trial's rung has kept it."""
        bracket, _ = self._trial_info[seat]
        return seat in bracket.trials_to_unpause

    def on_trial_result(self, tune_controller: Any, trial: Seat, result: dict[str, Any]) -> str:
        """Compare a trial with its bracket; one that has left it runs to its end."""
        bracket, _ = self._trial_info[trial]
        if trial not in bracket.current_trials():
            return str(self.CONTINUE)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_remove(self, tune_controller: Any, trial: Seat) -> None:
        """Let the others of a bracket go on when none of them waits for anybody else."""
        bracket, _ = self._trial_info[trial]
        if trial not in bracket.current_trials():
            return
        super().on_trial_remove(tune_controller, trial)

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        """Halve a bracket whose trials are all at the rung, and again while they are beyond the next one too.

        Tune's does so once, and leaves them waiting; and it forgets to say that it has ended.
        """
        action, more = str(self.PAUSE), True
        while more and bracket.current_trials():
            try:
                latest: str = super()._process_bracket(tune_controller, bracket)
            finally:
                bracket.is_being_processed = False
            action = action if action == self.STOP else latest
            more = bracket.cur_iter_done() and bracket._halves > 0
        return action
