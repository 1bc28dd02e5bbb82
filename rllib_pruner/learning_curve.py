"""A figure of trainings: score and return over the environment's steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedray.durable import on_disk, replacing
from rllib_pruner.files import Row


def draw_curves(trainings: Mapping[str, Sequence[Row]], path: Path, title: str) -> None:
    """Write a PNG: the score of the greedy policy, and below it the return in training.

    Args:
        trainings: name → its evaluations; names are shown where there are several.
        path: of the figure.
        title: of the figure.
    """
    figure = Figure(figsize=(6, 4.5), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    scores = [row["score"] for rows in trainings.values() for row in rows]
    for name, rows in trainings.items():
        above.plot(
            [row["env_steps"] for row in rows],
            [row["score"] for row in rows],
            marker="o",
            markersize=3,
            label=name,
        )
        ended = [row for row in rows if "return" in row]
        below.plot(
            [row["env_steps"] for row in ended], [row["return"] for row in ended], marker="o", markersize=3
        )
    above.set(title=title, ylabel="score, held out")
    if scores and max(scores) - min(scores) < 0.05:  # or noise would fill the picture
        middle = (max(scores) + min(scores)) / 2
        above.set_ylim(middle - 0.05, middle + 0.05)
    below.set(xlabel="environment steps", ylabel="return, exploring")
    if len(trainings) > 1:
        above.legend(frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with on_disk(path), replacing(path) as file:
        figure.savefig(file, format="png")
