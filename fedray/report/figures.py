"""The figures of a report: one line, or one strip, per setting.

A setting has the same colour, stroke and mark in all figures, and the settings of a method share its colour.
Up to `MAX_NAMED` are drawn in colour (FedAvg and those of the best final accuracy), further lines in grey.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedray.report.canvas import (
    GREY,
    LABEL_LINES,
    LABEL_WIDTH,
    MAX_NAMED,
    Curve,
    Floats,
    Format,
    Look,
    byte_unit,
    energy_unit,
    footnote,
    key_of_lines,
    log_axis,
    paper,
    plain_rounds,
    time_unit,
    widen_left,
    write_footnote,
    written,
)
from fedray.report.colours import inks
from fedray.report.decision_figure import DECISIONS, draw_decisions
from fedray.report.series import Setting

BY_ROUND = "accuracy_by_round.png"
BY_BYTES = "accuracy_by_bytes.png"
BY_TIME = "accuracy_by_time.png"
BY_ENERGY = "accuracy_by_energy.png"
DENSITY = "density_by_round.png"
CLIENTS = "client_accuracy.png"
NAMES = (BY_ROUND, BY_BYTES, BY_TIME, BY_ENERGY, DENSITY, CLIENTS, DECISIONS)
"""Files that a report may contain."""


def draw(
    settings: Sequence[Setting], target: float | None = None, formats: Sequence[Format] = ("png",)
) -> dict[str, bytes]:
    """Return file name → content, for each figure that the runs have data for.

    Args:
        settings: the settings to compare.
        target: a validation accuracy in (0, 1] to mark.
        formats: of the files; names are those of NAMES with the suffix of the format.
    """
    looks = looks_of(settings)
    pictures = {
        BY_ROUND: _accuracy(looks, "round", "round", plain_rounds, target),
        BY_BYTES: _accuracy(looks, "total/bytes/up", "uploaded by all clients so far", byte_unit, target),
        BY_TIME: _accuracy(looks, "total/time/simulated_s", "simulated time", time_unit, target),
        BY_ENERGY: _accuracy(looks, "total/energy/clients_j", "energy of all clients", energy_unit, target),
        DENSITY: _density(looks),
        CLIENTS: _clients(looks),
        DECISIONS: draw_decisions(looks),
    }
    return {
        f"{Path(name).stem}.{format}": written(figure, format)
        for name, figure in pictures.items()
        if figure is not None
        for format in formats
    }


def by_bytes(settings: Sequence[Setting]) -> bytes | None:
    """Return the picture of accuracy over uploaded bytes as PNG; None if there is nothing to draw."""
    figure = _accuracy(
        looks_of(settings), "total/bytes/up", "uploaded by all clients so far", byte_unit, None
    )
    return None if figure is None else written(figure)


def looks_of(settings: Sequence[Setting]) -> list[Look]:
    """Assign colours to the settings; grey ones come first, so that they lie below."""

    def rank(setting: Setting) -> tuple[bool, float]:
        final = np.nan_to_num([run.last("val/accuracy") for run in setting.runs])
        return setting.is_fedavg, float(np.mean(final))

    named = sorted(settings, key=rank, reverse=True)[:MAX_NAMED]
    often = Counter(_name(setting) for setting in named)

    def name(setting: Setting) -> str:
        """Return a short name, or the whole one where the short one is ambiguous."""
        short = _name(setting)
        return short if often[short] == 1 else _name(setting, cut=False)

    drawn = [setting for setting in settings if setting in named]
    methods = [str(setting.flat.get("method.name", "")) for setting in drawn]
    ink = dict(zip(map(id, drawn), inks(methods), strict=True))
    looks = [
        Look(setting, ink[id(setting)], name(setting)) if id(setting) in ink else Look(setting)
        for setting in settings
    ]
    return sorted(looks, key=lambda look: look.name is not None)


def _name(setting: Setting, cut: bool = True) -> str:
    lines = wrap(setting.label, LABEL_WIDTH, max_lines=LABEL_LINES if cut else None, placeholder=" …")
    return "\n".join(lines if setting.status == "finished" else [*lines, f"({setting.progress})"])


# ── lines
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def curve_of(look: Look, x: str, y: str) -> Curve | None:
    """Average the seeds round by round, over the rounds in which every seed has both numbers."""
    frames = [run.rounds for run in look.setting.runs]
    if not all(x in frame and y in frame for frame in frames):
        return None
    measured = [frame.dropna(subset=[x, y]).set_index("round", drop=False) for frame in frames]
    rounds = measured[0].index
    for frame in measured[1:]:
        rounds = rounds.intersection(frame.index)
    if not len(rounds):
        return None
    values = np.array([frame.loc[rounds, y].to_numpy(float) for frame in measured])
    places = np.array([frame.loc[rounds, x].to_numpy(float) for frame in measured])
    return Curve(look, places.mean(0), values.mean(0), values.min(0), values.max(0))


def _accuracy(
    looks: Sequence[Look],
    metric: str,
    title: str,
    unit_of: Callable[[float], tuple[float, str]],
    target: float | None,
) -> Figure | None:
    curves = [c for look in looks if (c := curve_of(look, metric, "val/accuracy")) is not None]
    if not curves:
        return None
    figure, axes = paper(looks)
    ends = [float(c.x[-1]) for c in curves]
    divisor, unit = unit_of(max(ends))
    done = [float(c.x[-1]) for c in curves if c.look.setting.status == "finished"] or ends
    logarithmic = metric != "round" and min(done) > 0 and max(done) > 8 * min(done)
    for curve in curves:
        _line(axes, curve, curve.x / divisor, positive=logarithmic)
    if target is not None:
        axes.axhline(target, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        place = axes.get_yaxis_transform()
        axes.text(0.005, target, f"{target:g}", transform=place, fontsize=8, color=GREY, va="bottom")
    low, high = _accuracy_range(curves, target)
    axes.set_ylim(low, high)
    if logarithmic:
        shown = np.concatenate([c.x[(c.x > 0) & (c.mean >= low)] for c in curves])
        axes.set_xlim(left=0.85 * float(shown.min()) / divisor)
        log_axis(axes, "x")
    else:
        axes.set_xlim(0, max(ends) / divisor * 1.02 or 1)
    if metric == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(f"{title} ({unit}{', logarithmic' if logarithmic else ''})" if unit else title)
    axes.set_ylabel("validation accuracy (share of examples)")
    footnote(figure, axes, curves)
    key_of_lines(figure, axes, curves)
    return figure


def _density(looks: Sequence[Look]) -> Figure | None:
    curves = [c for look in looks if (c := curve_of(look, "round", "density/global")) is not None]
    if not curves:
        return None
    figure, axes = paper(looks)
    for number, curve in enumerate(reversed(curves)):  # lines of equal density: the upper ones are thinner
        width = 2.8 - 1.4 * number / max(1, len(curves) - 1)
        _line(axes, curve, curve.x, width=width, order=2 + number / len(curves), steps="steps-post")
    personal = [c for curve in curves if (c := density_of_clients(curve)) is not None]
    for curve in personal:
        axes.plot(curve.x, curve.mean, color=curve.look.color, linestyle=(0, (1, 1)), linewidth=1.3)
    if min(float(c.low.min()) for c in (*curves, *personal)) < 0.05:
        log_axis(axes, "y")
        axes.set_ylim(top=1.15)
    else:
        axes.set_ylim(0, 1.04)
    axes.set_xlim(0, max(float(c.x[-1]) for c in curves) * 1.02 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")
    axes.set_ylabel("density (share of prunable weights kept)")
    footnote(figure, axes, curves, *(["dotted: mean over clients"] if personal else []))
    key_of_lines(figure, axes, curves)
    return figure


def density_of_clients(server: Curve) -> Curve | None:
    """Return the mean density of the clients' models, where they are not simply the server's.

    Clients train on the mask that the server had after the round before.
    """
    clients = curve_of(server.look, "round", "density/client_mean")
    if clients is None or server.look.name is None:
        return None
    before = dict(zip(server.x + 1, server.mean, strict=True))
    apart = [abs(own - before.get(x, own)) for x, own in zip(clients.x, clients.mean, strict=True)]
    return clients if max(apart) > 0.01 else None


def _accuracy_range(curves: Sequence[Curve], target: float | None) -> tuple[float, float]:
    """Return the limits of an accuracy axis, which leave out the first rounds."""
    ends = [float(c.mean[-1]) for c in curves]
    done = [float(c.mean[-1]) for c in curves if c.look.setting.status == "finished"] or ends
    enough = min(done) - max(0.2, 1.5 * (max(done) - min(done)))
    low = max(min(float(c.low.min()) for c in curves), min(enough, min(ends) - 0.05))
    high = max(float(c.high.max()) for c in curves)
    if target is not None:
        low, high = min(low, target), max(high, target)
    margin = 0.04 * (high - low) or 0.02
    return low - margin, high + margin


def _line(
    axes: Axes,
    curve: Curve,
    x: Floats,
    *,
    positive: bool = False,
    width: float = 1.7,
    order: float = 2,
    steps: str = "default",
) -> None:
    """Draw a mean, its band and the point where it ends."""
    look, drawn = curve.look, x > 0 if positive else np.full(len(x), True)
    named = look.name is not None
    order = order if named else 1.5
    axes.plot(
        x[drawn],
        curve.mean[drawn],
        color=look.color,
        linestyle=look.stroke,
        linewidth=width if named else 1.0,
        drawstyle=steps,
        zorder=order,
        solid_capstyle="round",
    )
    if named and len(look.setting.runs) > 1:
        axes.fill_between(
            x[drawn],
            curve.low[drawn],
            curve.high[drawn],
            color=look.color,
            alpha=0.16,
            linewidth=0,
            step="post" if steps != "default" else None,
            zorder=order - 0.5,
        )
    if named:
        done = look.setting.status == "finished"
        face = look.color if done else "white"
        some = np.flatnonzero(drawn)[:-1]
        step = max(1, len(some) // 6)
        some = some[len(look.name or "") % step :: step]  # names differ in length: fewer marks on each other
        axes.plot(
            x[some],
            curve.mean[some],
            marker=look.ink.mark,
            linestyle="none",
            color=look.color,
            markersize=3.6,
            markeredgewidth=0.5,
            zorder=order,
        )
        axes.plot(
            x[-1],
            curve.mean[-1],
            marker=look.ink.mark,
            linestyle="none",
            color=look.color,
            markerfacecolor=face,
            markersize=5.5,
            zorder=order + 1,
        )


# ── one strip per setting
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def _clients(looks: Sequence[Look]) -> Figure | None:
    """Draw how accuracy is spread over clients; the clients of all seeds together."""
    strips: list[tuple[Look, Floats]] = []
    for look in looks:
        frames = [run.client_accuracy for run in look.setting.runs]
        found = [frame["accuracy"].to_numpy(float) for frame in frames if frame is not None]
        if look.name is not None and len(found) == len(frames):
            strips.append((look, np.sort(np.concatenate(found))))
    if not strips:
        return None
    figure, axes = paper([look for look, _ in strips for _ in range(2)])
    half = 0.3
    for row, (look, values) in enumerate(strips):
        p5, p25, p50, p75, p95 = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        # the golden ratio spreads points evenly over the height, the same in each drawing
        height = (np.arange(len(values)) * 0.6180339887 % 1 - 0.5) * 2 * half
        axes.scatter(values, row + height, s=9, color=look.color, alpha=_opacity(len(values)), linewidth=0)
        axes.plot([p5, p95], [row, row], color=look.color, linewidth=1.4, zorder=3)
        axes.plot([p25, p75], [row, row], color=look.color, linewidth=7, solid_capstyle="butt", zorder=4)
        axes.plot(
            p50,
            row,
            marker=look.ink.mark,
            linestyle="none",
            color=look.color,
            markerfacecolor="white",
            markersize=6.5,
            zorder=5,
        )
    kinds = [_examples_of(look.setting) for look, _ in strips]
    same = len(set(kinds)) == 1
    names = [
        look.name if same else f"{look.name}\n({kind})" for (look, _), kind in zip(strips, kinds, strict=True)
    ]
    axes.set_yticks(range(len(strips)), [name or "" for name in names], fontsize=9)
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color="#e6e6e6", linewidth=0.7)
    axes.spines["left"].set_visible(False)
    lowest = min(float(values[0]) for _, values in strips)
    axes.set_xlim(max(-0.01, lowest - 0.03), 1.01)
    on = kinds[0] if same else "examples"
    axes.set_xlabel(f"accuracy of the final model on a client's own {on} (share of examples)")
    widen_left(figure, axes)
    write_footnote(
        figure, axes, "point: a client · open mark: median · bar: middle half · line: 5th to 95th percentile"
    )
    return figure


def _examples_of(setting: Setting) -> str:
    """Name the examples on which clients measured the accuracy of a setting."""
    held_out = setting.flat.get("data.client_test_fraction")
    return "held-out examples" if held_out else "training examples"


def _opacity(points: int) -> float:
    return float(np.clip(40 / points, 0.08, 0.5))
