"""Figure of a policy's decisions: density per round, action per stage."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedray.report.canvas import (
    BLACK,
    GREY,
    Curve,
    Look,
    footnote,
    key_of_lines,
    log_axis,
    paper,
)
from fedray.report.reading import RunData

DECISIONS = "decisions.png"
FACTOR, ACTION, ASKED = "method/factor", "method/action", "method/asked"
MOST_RUNS = 5
"""At most this many seeds of a setting are drawn."""


def draw_decisions(looks: Sequence[Look]) -> Figure | None:
    """Draw each run with a policy, a line per seed; None if there is none.

    A triangle points down where the policy pruned, up where it restored weights; a dot is a hold.
    A hollow one marks a decision that was carried out in part only.
    """
    curves: list[Curve] = []
    figure, axes = paper(looks)
    for look in looks:
        if look.name is not None:
            runs = [run for run in look.setting.runs if FACTOR in run.rounds][:MOST_RUNS]
            curves += [_run(axes, look, run) for run in runs][:1]  # one name for all seeds
    if not curves:
        return None
    log_axis(axes, "y")
    axes.set_ylim(top=1.3)
    axes.set_xlim(0, max(float(curve.x[-1]) for curve in curves) * 1.02 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")
    axes.set_ylabel("density (share of prunable weights kept)")
    marks = "▼ pruned · ▲ restored · ● held · hollow: carried out in part · a line per seed"
    footnote(figure, axes, [], marks)
    key_of_lines(figure, axes, curves, marks=False)
    return figure


def _run(axes: Axes, look: Look, run: RunData) -> Curve:
    """Draw one run; return its line."""
    rounds = run.rounds
    x, density = rounds["round"].to_numpy(float), rounds["density/global"].to_numpy(float)
    axes.plot(
        x, density, color=look.color, linestyle=look.stroke, linewidth=1.1, drawstyle="steps-post", alpha=0.7
    )
    decided = rounds.dropna(subset=[FACTOR])
    factor = decided[FACTOR].to_numpy(float)
    milder = (decided[ACTION] != decided[ASKED]).to_numpy(bool)
    kinds = {"v": factor < 1, "^": factor > 1, "o": factor == 1}
    for marker, chosen in kinds.items():
        for hollow in (False, True):
            shown = decided[chosen & (milder == hollow)]
            axes.scatter(
                shown["round"],
                shown["density/global"],
                marker=marker,
                s=12 if marker == "o" else 26,
                facecolor="white" if hollow else look.color,
                edgecolor=BLACK if hollow else GREY,
                linewidth=0.5,
                zorder=4,
            )
    return Curve(look, x, density, density, density)
