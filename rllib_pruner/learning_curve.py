"""The picture of a training: the judge's score and the episodes' return over the environment's steps."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rllib_pruner.files import Row


def draw_curve(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG: the score of the greedy policy, and below it the return in training."""
    figure = Figure(figsize=(6, 4.5), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["env_steps"] for row in rows]
    scores = [row["score"] for row in rows]
    above.plot(steps, scores, marker="o", markersize=3)
    above.set(
        title=title, ylabel="score, held out", ylim=(min(0.0, *scores) - 0.05, max(1.0, *scores) + 0.05)
    )
    told = [row for row in rows if "return" in row]
    below.plot([row["env_steps"] for row in told], [row["return"] for row in told], marker="o", markersize=3)
    below.set(xlabel="environment steps", ylabel="return, exploring")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.writing")
    figure.savefig(partial, format="png")
    partial.replace(path)
