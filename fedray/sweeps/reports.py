"""The reports of a trial to Tune, from its process: rounds, those that were not reported yet, the end."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedray.config.run_config import RunConfig
from fedray.config.stop_rules import Targets
from fedray.storage.directory import is_asked_to_stop
from fedray.storage.run_files import RunFiles
from fedray.sweeps.judging import last_judged, rounds_of
from fedray.sweeps.outcome import STOPPED
from fedray.sweeps.tune import ASKS, Asked, end_if_asked
from fedray.types import RoundReport


class Reports:
    """What a trial tells Tune.

    The last round is reported after all files are written: a scheduler may end the trial with any report.

    Args:
        sweep: the sweep's directory.
        place: the trial's.
        config: the trial's.
        metric: the metric that is compared.
        targets: at which the trial ends.
        check: called with all metrics seen so far, and the round; it raises if the metric is due.
    """

    def __init__(
        self,
        sweep: Path,
        place: Path,
        config: RunConfig,
        metric: str,
        targets: Targets,
        check: Callable[[Mapping[str, Any], int], None],
    ) -> None:
        self.sweep, self.place = sweep, place
        self.config, self.metric = config, metric
        self.targets, self.check = targets, check
        self.seen: dict[str, Any] = {}
        self._last: dict[str, Any] = {}

    def round(self, report: RoundReport) -> None:
        """Report a round; the trial ends here if the driver has asked it to."""
        from ray import tune

        end_if_asked(self.sweep)
        metrics = {"round": report.round, **report.metrics}
        self.seen.update(metrics)
        self.check(self.seen, report.round)
        if report.round == self.config.rounds or self.ended(report.round, report.metrics) is not None:
            self._last = metrics
            return
        self._end_if_stopped(report.round)
        if self.metric in metrics or report.round % self.config.eval_every == 0:
            tune.report(metrics)

    def _end_if_stopped(self, round: int) -> None:
        """End the trial as a stopped one if `fedray stop` was called for it alone."""
        if is_asked_to_stop(self.place):
            RunFiles(self.place).write_json(STOPPED, {"round": round})
            raise Asked

    def ended(self, round: int, metrics: Mapping[str, Any]) -> str | None:
        """Return why the trial ends with a round; None: it does not."""
        ended = self.targets(round, metrics)
        if ended is not None:
            self._last = {"round": round, **metrics}
        return ended

    def before(self, name: str, place: Path, *, asks: bool) -> None:
        """Read the rounds of an earlier try; report those that the scheduler does not know.

        Args:
            name: of the trial.
            place: its directory.
            asks: whether a scheduler decides if the trial may train; one that may not ends in a report.
        """
        from ray import tune

        rounds = rounds_of(place)
        for line in rounds:
            self.seen.update(line)
        judged = last_judged(self.sweep, name) if asks else None
        if judged is not None:
            tune.report({"round": judged, ASKS: True})
        for line in rounds if asks else ():
            is_new = judged is None or line["round"] > judged
            if is_new and line["round"] < self.config.rounds and self.metric in line:
                tune.report(line)

    def last(self) -> None:
        """Report the last round."""
        from ray import tune

        if self._last:
            tune.report(self._last)
