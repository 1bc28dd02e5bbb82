"""The result of a run, as Python and notebooks see it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.durable import shown

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True, repr=False)
class History:
    """The result of a run.

    Args:
        path: the run's directory.
        rounds: for each round, metric → value, `round` among them; round 0 is the set-up.
        result: every final metric by name, `weights_sha256` and `status`.
    """

    path: Path
    rounds: tuple[dict[str, Any], ...]
    result: dict[str, Any]

    def __repr__(self) -> str:
        """Return one line: where the run is, its rounds and its accuracy."""
        accuracy = self.result.get("test/accuracy")
        reached = "" if accuracy is None else f", test/accuracy={accuracy:.4f}"
        return f"History({shown(self.path)!r}, {len(self.rounds) - 1} rounds{reached})"

    def _repr_html_(self) -> str:
        """Return a small table, and a picture of accuracy over bytes, for notebooks."""
        from fedray.report.notebook import html_of

        return html_of([self.path], repr(self))

    @property
    def weights_sha256(self) -> str:
        """SHA-256 (hex) of the final weights."""
        return str(self.result["weights_sha256"])

    def model(self) -> "nn.Module":
        """Return the final model in evaluation mode; `fedray.load_model` says more."""
        from fedray.storage.final_model import load_model

        model: nn.Module = load_model(self.path)
        return model

    def table(self) -> "pd.DataFrame":
        """Return the run's row of a report: final accuracies, density and costs, with their units."""
        from fedray.report.reading import load_run
        from fedray.report.table import comparison

        return comparison([load_run(self.path)])

    def to_pandas(self) -> "pd.DataFrame":
        """Return a table with a row per round, indexed by round, and a column per metric."""
        import pandas as pd

        return pd.DataFrame(list(self.rounds)).set_index("round")
