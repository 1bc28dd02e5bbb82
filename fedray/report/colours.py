"""Colours belong to methods; the settings of one method differ in shade, stroke and mark.

    method → colour and first mark;  number of the setting within its method → shade, stroke, mark

A method has the same colour in all pictures of all reports. No two settings look alike, however many.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Literal

from matplotlib.colors import hsv_to_rgb, to_hex, to_rgb

Stroke = Literal["-"] | tuple[float, tuple[float, ...]]

MARKS = (*"os^DvPX<>ph*8dH", r"$\clubsuit$")
COLOURS = {
    "fedavg": ("#1a1a1a", "o"),
    "staged": ("#0072B2", "s"),
    "snip": ("#D55E00", "^"),
    "frlp": ("#009E73", "D"),
    "prunefl": ("#CC79A7", "v"),
    "autoflip": ("#E69F00", "P"),
    "ceafl": ("#56B4E9", "X"),
    "pqsu": ("#8C510A", "<"),
    "fedlp": ("#6A3D9A", ">"),
    "fedmef": ("#B2182B", "p"),
    "heterofl": ("#1F3B73", "H"),
    "fedrolex": ("#00C98D", r"$\clubsuit$"),
    "random_mask": ("#7F7F7F", "h"),
    "fedavg_server": ("#8A8D0F", "*"),
    "fedavg_warm": ("#00A6B4", "8"),
    "fedavg_small": ("#7CBF3A", "d"),
}
"""Method → its colour and first mark. The first seven colours are those of Okabe and Ito, 2008, but yellow.

In grey, and for the colour-blind, marks and strokes tell the lines apart.
"""

ALIKE = 0.07
"""Two colours of a smaller distance in Oklab (0 to 1) are taken for one."""


@dataclass(frozen=True)
class Ink:
    """How the line of a setting is drawn: a colour, a stroke and the mark at its points."""

    colour: str
    stroke: Stroke
    mark: str


def inks(methods: Iterable[str]) -> list[Ink]:
    """Return an ink for each setting, given its method; no two are alike."""
    numbers: dict[str, Iterator[int]] = {}
    chosen: list[Ink] = []
    for method in methods:
        following = numbers.setdefault(method, count())
        free = (ink for ink in (ink_of(method, k) for k in following) if not _taken(ink, chosen))
        chosen.append(next(free))
    return chosen


def _taken(ink: Ink, chosen: Iterable[Ink]) -> bool:
    return any(alike(ink, other) for other in chosen)


def ink_of(method: str, number: int) -> Ink:
    """Return the ink of a method's setting: 0 has the method's own colour and mark, and a full line."""
    colour, mark = base_of(method)
    turn, place = divmod(number, 12)  # 3 shades and 4 strokes, both new with each setting
    further, turn = divmod(turn, len(MARKS))
    mark = MARKS[(MARKS.index(mark) + turn) % len(MARKS)]
    return Ink(_shade(colour, place % 3), stroke_of(place % 4 + 4 * further), mark)


def base_of(method: str) -> tuple[str, str]:
    """Return a method's colour and mark: of the table, or drawn from its name."""
    if method in COLOURS:
        return COLOURS[method]
    hue, value, mark, *_ = blake2b(method.encode()).digest()
    red, green, blue = hsv_to_rgb((hue / 256, 0.75, 0.5 + 0.3 * value / 255))
    return to_hex((red, green, blue)), MARKS[mark % len(MARKS)]


def stroke_of(number: int) -> Stroke:
    """Return one of endlessly many strokes: full, dashed, dotted, dash-dotted, and with ever more dots."""
    first: tuple[Stroke, ...] = ("-", (0, (3.5, 1.2)), (0, (1.2, 1.0)), (0, (5.0, 1.2, 1.2, 1.2)))
    if number < len(first):
        return first[number]
    return (0, (5.0, 1.2, *(1.2, 1.2) * (number - 2)))


def alike(one: Ink, other: Ink) -> bool:
    """Tell whether two lines could be taken for each other."""
    if (one.stroke, one.mark) != (other.stroke, other.mark):
        return False
    return distance(one.colour, other.colour) < ALIKE


def distance(one: str, other: str) -> float:
    """Return the distance of two colours in Oklab (Ottosson, 2020), where 1 is black to white."""
    a, b = _oklab(one), _oklab(other)
    return float(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5)


def _oklab(colour: str) -> tuple[float, float, float]:
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def _shade(colour: str, number: int) -> str:
    """Return the colour itself, a darker and a lighter one; of a dark colour two lighter ones."""
    dark = _oklab(colour)[0] < 0.35
    aim, share = ((0.0, 0.0), (1.0 if dark else 0.0, 0.4), (1.0, 0.62 if dark else 0.45))[number]
    red, green, blue = ((1 - share) * c + share * aim for c in to_rgb(colour))
    return to_hex((red, green, blue))
