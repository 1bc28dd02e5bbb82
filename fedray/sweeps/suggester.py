"""The searcher that Tune asks for trials: it hands `Suggestions` on."""

import sys
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from fedray.sweeps.suggesting import Suggestions


class Suggester(Searcher):  # type: ignore[misc]  # Ray has no types
    """Hands points to Tune, and the ends of trials to the searcher.

    Args:
        suggestions: the points.
        is_ending: tells whether the sweep is ending: then no point is drawn, and an interrupted trial is no
            result.
        limit: trials at once, asked again before each; no limit where Tune keeps one.
        mirror: brings the directories of trials that ran on other nodes up to date.
    """

    def __init__(
        self,
        suggestions: Suggestions,
        is_ending: Callable[[], bool],
        limit: Callable[[], int] = lambda: sys.maxsize,
        mirror: Callable[[list[str]], None] = lambda names: None,
    ) -> None:
        super().__init__()
        self.suggestions, self.is_ending, self.limit = suggestions, is_ending, limit
        self.mirror = mirror
        self.running: set[str] = set()
        self.names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's name, None if it must wait, or that there is no other."""
        if self.is_ending():
            return Searcher.FINISHED  # with None, Tune would wait for a point for ever
        if len(self.running) >= self.limit():
            return None
        point = self.suggestions.next()
        if point is None:
            return Searcher.FINISHED
        self.names[trial_id] = point.name
        self.running.add(trial_id)
        return {"name": point.name}

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """Do nothing: a searcher learns from the ends of trials."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Tell the searcher, by the files of the trial."""
        self.running.discard(trial_id)
        if not self.is_ending():
            self.mirror([self.names[trial_id]])
            self.suggestions.ended(self.names[trial_id], error)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: `points.jsonl` has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Pickle as a searcher without points: Tune pickles it, and does not read it."""
        return Searcher, ()
