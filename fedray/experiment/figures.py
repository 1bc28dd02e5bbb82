"""The pictures of a report: one line, or one strip, per setting.

Settings keep their colour and stroke in all pictures; FedAvg is black. Up to `MAX_NAMED` are drawn in colour (FedAvg
and those of the best final accuracy), further lines in grey. Nothing here touches pyplot or its global state.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from fedray.experiment.report import Setting

Floats = NDArray[np.float64]

BY_ROUND = "accuracy_by_round.png"
BY_BYTES = "accuracy_by_bytes.png"
BY_TIME = "accuracy_by_time.png"
DENSITY = "density_by_round.png"
CLIENTS = "client_accuracy.png"
NAMES = (BY_ROUND, BY_BYTES, BY_TIME, DENSITY, CLIENTS)
"""Every file that may be drawn."""

SIZE_INCHES, DPI = (7.7, 5.0), 130  # 1001 × 650 pixels
MAX_NAMED = 12
MAX_LABEL = 34  # characters
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito, "Color universal design", 2008, without the yellow, which is lost on white."""
BLACK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#cfcfcf"
STROKES = ("-", (0, (5, 1.6)), (0, (1.3, 1.3)))


@dataclass(frozen=True)
class Look:
    """How a setting is drawn; `name` is None for those in grey."""

    setting: Setting
    color: str = PALE
    stroke: str | tuple[float, tuple[float, ...]] = "-"
    name: str | None = None


@dataclass(frozen=True)
class Curve:
    """A line: the mean over seeds, and the smallest and largest; all (points,)."""

    look: Look
    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def draw(settings: Sequence[Setting], target: float | None = None) -> dict[str, bytes]:
    """Return file name (of NAMES) → PNG, for what the runs have data for.

    Args:
        settings: what is to be compared.
        target: a validation accuracy in (0, 1] to mark.
    """
    looks = _looks(settings)
    pictures = {
        BY_ROUND: _accuracy(looks, "round", "round", _plain_rounds, target),
        BY_BYTES: _accuracy(looks, "total/bytes/up", "sent by all clients so far", _byte_unit, target),
        BY_TIME: _accuracy(looks, "total/time/simulated_s", "simulated time", _time_unit, target),
        DENSITY: _density(looks),
        CLIENTS: _clients(looks),
    }
    return {name: _png(figure) for name, figure in pictures.items() if figure is not None}


def _looks(settings: Sequence[Setting]) -> list[Look]:
    """Give the settings their colours; those in grey come first, so that they lie below."""

    def rank(setting: Setting) -> tuple[bool, float]:
        final = np.nan_to_num([run.last("val/accuracy") for run in setting.runs])
        return setting.is_fedavg, float(np.mean(final))

    named = sorted(settings, key=rank, reverse=True)[:MAX_NAMED]
    looks, dense, others = [], 0, 0
    for setting in settings:
        if setting not in named:
            looks.append(Look(setting))
        elif setting.is_fedavg:
            looks.append(Look(setting, BLACK, STROKES[dense % len(STROKES)], _name(setting)))
            dense += 1
        else:
            turn, color = divmod(others, len(PALETTE))
            looks.append(Look(setting, PALETTE[color], STROKES[turn % len(STROKES)], _name(setting)))
            others += 1
    return sorted(looks, key=lambda look: look.name is not None)


def _name(setting: Setting) -> str:
    label = setting.label if len(setting.label) <= MAX_LABEL else f"{setting.label[: MAX_LABEL - 1]}…"
    return label if setting.status == "finished" else f"{label}\n({setting.progress})"


# ── lines
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def _curve(look: Look, x: str, y: str) -> Curve | None:
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
    curves = [c for look in looks if (c := _curve(look, metric, "val/accuracy")) is not None]
    if not curves:
        return None
    figure, axes = _paper()
    ends = [float(c.x[-1]) for c in curves]
    divisor, unit = unit_of(max(ends))
    logarithmic = metric != "round" and min(ends) > 0 and max(ends) > 8 * min(ends)
    for curve in curves:
        _line(axes, curve, curve.x / divisor, positive=logarithmic)
    if target is not None:
        axes.axhline(target, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    if logarithmic:
        _log_axis(axes, "x")
    elif metric == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not logarithmic:
        axes.set_xlim(0, max(ends) / divisor * 1.02 or 1)
    axes.set_xlabel(f"{title} ({unit}{', logarithmic' if logarithmic else ''})" if unit else title)
    axes.set_ylabel("validation accuracy (share of examples)")
    _key(figure, axes, curves)
    _footnote(figure, curves)
    return figure


def _density(looks: Sequence[Look]) -> Figure | None:
    curves = [c for look in looks if (c := _curve(look, "round", "density/global")) is not None]
    if not curves:
        return None
    figure, axes = _paper()
    for number, curve in enumerate(reversed(curves)):  # lines of equal density: the upper ones are thinner
        width = 3.4 - 2.0 * number / max(1, len(curves) - 1)
        _line(axes, curve, curve.x, width=width, order=2 + number / len(curves), steps="steps-post")
    if min(float(c.low.min()) for c in curves) < 0.05:
        _log_axis(axes, "y")
        axes.set_ylim(top=1.15)
    else:
        axes.set_ylim(0, 1.04)
    axes.set_xlim(0, max(float(c.x[-1]) for c in curves) * 1.02 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel("density of the server's mask (share of prunable weights kept)")
    _key(figure, axes, curves)
    _footnote(figure, curves)
    return figure


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
        axes.plot(
            x[-1], curve.mean[-1], "o", color=look.color, markerfacecolor=face, markersize=4.5, zorder=order + 1
        )


# ── one strip per setting
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def _clients(looks: Sequence[Look]) -> Figure | None:
    """Draw how accuracy is spread over clients; the clients of all seeds together."""
    strips: list[tuple[Look, Floats]] = []
    for look in looks:
        frames = [run.client_accuracy for run in look.setting.runs]
        values = [frame["accuracy"].to_numpy(float) for frame in frames if frame is not None]
        if look.name is not None and len(values) == len(frames):
            strips.append((look, np.sort(np.concatenate(values))))
    if not strips:
        return None
    figure, axes = _paper()
    half = 0.3
    for row, (look, values) in enumerate(strips):
        p5, p25, p50, p75, p95 = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        # the golden ratio spreads points evenly over the height, the same in each drawing
        height = (np.arange(len(values)) * 0.6180339887 % 1 - 0.5) * 2 * half
        axes.scatter(values, row + height, s=7, color=look.color, alpha=_opacity(len(values)), linewidth=0)
        axes.plot([p5, p95], [row, row], color=look.color, linewidth=1.4, zorder=3)
        axes.plot([p25, p75], [row, row], color=look.color, linewidth=7, solid_capstyle="butt", zorder=4)
        axes.plot(p50, row, "o", color=look.color, markerfacecolor="white", markersize=6.5, zorder=5)
    axes.set_yticks(range(len(strips)), [look.name or "" for look, _ in strips], fontsize=9)
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color="#e6e6e6", linewidth=0.7)
    axes.spines["left"].set_visible(False)
    lowest = min(float(values[0]) for _, values in strips)
    axes.set_xlim(max(-0.01, lowest - 0.03), 1.01)
    axes.set_xlabel("accuracy of the final model on a client's own examples (share of examples)")
    _widen_left(figure, axes)
    _write_footnote(figure, "point: a client · circle: median · bar: middle half · line: 5th to 95th percentile")
    return figure


def _opacity(points: int) -> float:
    return float(np.clip(25 / points, 0.06, 0.4))


# ── paper, axes and keys
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def _paper() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.145, 0.875, 0.825))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9a9a9a")
    axes.tick_params(colors=GREY, labelcolor=BLACK, labelsize=9)
    axes.grid(visible=True, axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(size=10, color=BLACK)
    axes.yaxis.label.set(size=10, color=BLACK)
    return figure, axes


def _log_axis(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 where it spans little."""
    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    few = log10(high / low) < 3.2
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _key(figure: Figure, axes: Axes, curves: Sequence[Curve]) -> None:
    """Name the lines at the right, from the highest end to the lowest, each as near its end as there is room."""
    named = sorted((c for c in curves if c.look.name is not None), key=lambda c: -c.mean[-1])
    others = len(curves) - len(named)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    texts = [
        axes.annotate(c.look.name or "", (0, 0), fontsize=9, color=BLACK, va="center", linespacing=1.05)
        for c in named
    ]
    if others:
        texts.append(axes.annotate(f"{others} more", (0, 0), fontsize=9, color=GREY, va="center"))
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    swatch, pad = 30.0, 12.0  # pixels
    full_width, full_height = figure.bbox.width, figure.bbox.height
    room = max((box.width for box in boxes), default=0.0) + swatch + 2 * pad
    place = axes.get_position()
    axes.set_position((place.x0, place.y0, 1 - place.x0 - room / full_width, place.height))
    bottom, top = place.y0 * full_height, place.y1 * full_height
    wanted = [top - axes.transData.transform((c.x[-1], c.mean[-1]))[1] for c in named]
    wanted += [top - bottom] * bool(others)
    heights = spread(wanted, [box.height + 3 for box in boxes], top - bottom)
    left = full_width - room + pad
    for number, (text, down) in enumerate(zip(texts, heights, strict=True)):
        look = named[number].look if number < len(named) else Look(curves[0].look.setting)
        y = top - down
        text.set(transform=None, position=(left + swatch, y))
        text.xy = (left + swatch, y)
        figure.add_artist(
            Line2D([left, left + swatch - 6], [y, y], color=look.color, linestyle=look.stroke, linewidth=2, transform=None)
        )


def spread(wanted: Sequence[float], sizes: Sequence[float], room: float) -> list[float]:
    """Return centres near the wanted ones, ascending like them, at which things of these sizes do not overlap.

    Args:
        wanted: ascending positions.
        sizes: extent of each, > 0.
        room: length of the line; centres stay within it if the sizes have room there.
    """
    offsets = np.concatenate(([0.0], np.cumsum([(a + b) / 2 for a, b in zip(sizes, sizes[1:], strict=False)])))
    blocks: list[tuple[float, int]] = []  # (mean, count): isotonic regression by pooling adjacent violators
    for value in np.asarray(wanted) - offsets[: len(wanted)]:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            above, many = blocks.pop()
            mean, count = (mean * count + above * many) / (count + many), count + many
        blocks.append((mean, count))
    free = np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])
    return list(np.clip(free, 0.0, max(0.0, room - float(offsets[-1]))) + offsets) if len(wanted) else []
