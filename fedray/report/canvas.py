"""The canvas of a report's figures: figure and axes, lines and their labels, units and footnotes.

A setting has the same colour, stroke and mark in all figures of a report (`colours`). pyplot is not used.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10
from typing import Literal, get_args

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray

from fedray.errors import ConfigError, unknown
from fedray.report.colours import Ink, Stroke
from fedray.report.series import Setting

Floats = NDArray[np.float64]

SIZE_INCHES, DPI = (7.7, 5.0), 130  # 1001 × 650 pixels
MAX_NAMED = 60
LINE_INCHES = 0.155  # of a name, where the figure grows with their number
LABEL_WIDTH, LABEL_LINES = 28, 2  # characters, lines
BLACK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#cfcfcf"
Format = Literal["png", "svg", "pdf"]
FORMATS: tuple[Format, ...] = get_args(Format)


PLAIN = Ink(PALE, "-", "None")
"""Lines without a name."""


@dataclass(frozen=True)
class Look:
    """How a setting is drawn; `name` is None for those in grey."""

    setting: Setting
    ink: Ink = PLAIN
    name: str | None = None

    @property
    def color(self) -> str:
        """The colour of the line."""
        return self.ink.colour

    @property
    def stroke(self) -> Stroke:
        """The stroke of the line."""
        return self.ink.stroke


@dataclass(frozen=True)
class Curve:
    """A line: the mean over seeds, and the smallest and largest; all (points,)."""

    look: Look
    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def paper(looks: Sequence[Look] = ()) -> tuple[Figure, Axes]:
    """Return a figure that has room for the names of the looks."""
    lines = sum(look.name.count("\n") + 1.2 for look in looks if look.name is not None)
    width, height = SIZE_INCHES
    size = (width, max(height, LINE_INCHES * (lines + 1) / 0.86))
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.115, 0.875, 0.86))
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


def log_axis(axes: Axes, which: str) -> None:
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


def key_of_lines(figure: Figure, axes: Axes, curves: Sequence[Curve], *, marks: bool = True) -> None:
    """Label the lines at the right, the highest end first, each as near its end as there is room.

    Places are shares of the figure, since formats differ in their pixels.
    """
    named = sorted((c for c in curves if c.look.name is not None), key=lambda c: -c.mean[-1])
    looks = [(c.look.name or "", c.look) for c in named]
    if len(curves) > len(named):
        looks.append((f"{len(curves) - len(named)} more", Look(curves[0].look.setting)))
    pixels, size = IdentityTransform(), 9 if len(looks) <= 8 else 8
    texts = [
        figure.text(0, 0, name, transform=pixels, fontsize=size, color=BLACK, va="center", linespacing=1.05)
        for name, _ in looks
    ]
    boxes = [text.get_window_extent() for text in texts]
    swatch, pad = 36.0, 12.0
    room = max(box.width for box in boxes) + swatch + 2 * pad
    place, width, height = axes.get_position(), figure.bbox.width, figure.bbox.height
    axes.set_position((place.x0, place.y0, 1 - place.x0 - room / width, place.height))

    top, tall, left = place.y1 * height, place.height * height, width - room + pad
    wanted = [top - axes.transData.transform((c.x[-1], c.mean[-1]))[1] for c in named]
    wanted += wanted[-1:] * (len(looks) - len(named))
    downs = spread(wanted, [box.height + 3 for box in boxes], tall)
    for (_, look), text, down in zip(looks, texts, downs, strict=True):
        y = top - down
        text.set_transform(figure.transFigure)
        text.set_position(((left + swatch) / width, y / height))
        xs = [at / width for at in (left, left + (swatch - 8) / 2, left + swatch - 8)]
        figure.add_artist(
            Line2D(
                xs,
                [y / height] * 3,
                color=look.color,
                linestyle=look.stroke,
                linewidth=1.8,
                marker=look.ink.mark if marks else "None",
                markevery=[1],
                markersize=5,
                transform=figure.transFigure,
            )
        )


def spread(wanted: Sequence[float], sizes: Sequence[float], room: float) -> list[float]:
    """Return ascending centres near the given ones, such that items of these sizes do not overlap.

    Args:
        wanted: ascending positions, at least one.
        sizes: extent of each, > 0.
        room: length of the line; centres stay within it if the sizes have room there.
    """
    offsets = np.concatenate(([0.0], np.cumsum([(a + b) / 2 for a, b in pairwise(sizes)])))
    blocks: list[tuple[float, int]] = []  # (mean, count): isotonic regression by pooling adjacent violators
    for value, offset in zip(wanted, offsets, strict=True):
        mean, count = float(value - offset), 1
        while blocks and blocks[-1][0] > mean:
            above, many = blocks.pop()
            mean, count = (mean * count + above * many) / (count + many), count + many
        blocks.append((mean, count))
    free = np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])
    return list(np.clip(free, 0.0, max(0.0, room - float(offsets[-1]))) + offsets)


def widen_left(figure: Figure, axes: Axes) -> None:
    """Make room for the names at the left of an axis."""
    widest = max(label.get_window_extent().width for label in axes.get_yticklabels())
    place, left = axes.get_position(), (widest + 24) / figure.bbox.width
    axes.set_position((left, place.y0, place.x1 - left, place.height))


def footnote(figure: Figure, axes: Axes, curves: Sequence[Curve], *more: str) -> None:
    """Explain bands and open marks, if the figure has any."""
    named = [c.look.setting for c in curves if c.look.name is not None]
    parts = list(more)
    if any(len(setting.runs) > 1 for setting in named):
        parts.append("line: mean over seeds · band: smallest to largest")
    if any(setting.status != "finished" for setting in named):
        parts.append("open mark at the end: did not make all rounds")
    if parts:
        write_footnote(figure, axes, " · ".join(parts))


def write_footnote(figure: Figure, axes: Axes, text: str) -> None:
    """Write below the axis's title, for which the axes make room."""
    place, rise = axes.get_position(), 0.03
    axes.set_position((place.x0, place.y0 + rise, place.width, place.height - rise))
    figure.text(0.99, 0.015, text, fontsize=7.5, color=GREY, ha="right", va="bottom")


def plain_rounds(most: float) -> tuple[float, str]:
    return 1.0, ""


def byte_unit(most: float) -> tuple[float, str]:
    """Return what to divide bytes by, and its name, for numbers up to `most`."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((size, name) for size, name in units if most >= size), (1.0, "bytes"))


def energy_unit(most: float) -> tuple[float, str]:
    """Return what to divide joules by, and its name, for numbers up to `most`."""
    units = ((3.6e6, "kWh"), (1e3, "kJ"))
    return next(((size, name) for size, name in units if most >= size), (1.0, "J"))


def time_unit(most: float) -> tuple[float, str]:
    """Return what to divide seconds by, and its name, for numbers up to `most`."""
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next(((size, name) for size, name in units if most >= 2 * size), (1.0, "seconds"))


def formats_of(names: Sequence[str]) -> list[Format]:
    """Return the formats of these names, each once.

    Raises:
        ConfigError: for a name that is not in FORMATS.
    """
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--format: {unknown('format', name, FORMATS)}")
    return [format for format in FORMATS if format in names]


def written(figure: Figure, format: Format = "png") -> bytes:
    """Return a figure as a file; the same figure gives the same bytes."""
    data = io.BytesIO()
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[format]
    with rc_context({"svg.hashsalt": "fedray", "pdf.fonttype": 42}):
        figure.savefig(data, format=format, dpi=DPI, metadata=undated)
    return data.getvalue()
