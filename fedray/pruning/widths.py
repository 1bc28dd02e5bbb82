"""Slices of a model: the same network with a share of the channels of each layer.

Levels and their shares are those of HeteroFL (Diao et al., ICLR 2021): a is the whole width, each next one
half of the one before. A slice holds a window of each layer's channels: the first ones, or, as in FedRolex
(Alam et al., NeurIPS 2022), as many from another start on, round the end. It is a mask without the other
channels, so a slice trains, and travels, as a physically smaller model.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from fedray.pruning.channels import channel_mask, channels_at
from fedray.types import ChannelGroup, Layout, Mask

Level = Literal["a", "b", "c", "d", "e"]
RATES: dict[str, float] = {"a": 1, "b": 1 / 2, "c": 1 / 4, "d": 1 / 8, "e": 1 / 16}
"""Level → share of each layer's channels."""

CACHED_SLICES = 32
"""Masks of slices that are remembered, the latest ones."""


@dataclass(frozen=True)
class Mix:
    """The levels of a population.

    Args:
        rates: of the levels, widest first.
        shares: of the clients that have each; they add up to 1.
    """

    rates: tuple[float, ...]
    shares: tuple[float, ...]

    @property
    def widest(self) -> float:
        """The largest rate."""
        return self.rates[0]

    def at(self, position: float) -> float:
        """Return the rate at a position in [0, 1): the widest level has the first positions."""
        ends = list(accumulate(self.shares))
        found = next((rate for rate, end in zip(self.rates, ends, strict=True) if position < end), None)
        return self.rates[-1] if found is None else found


def mix_of(levels: str) -> Mix:
    """Read levels as HeteroFL writes them: a-c-e in equal parts, a2-e8 in these.

    Raises:
        ValueError: if it is not such a text, or a level is named twice.
    """
    found = [re.fullmatch(r"([a-e])([1-9]\d{0,5})?", part) for part in levels.split("-")]
    names = [match[1] for match in found if match]
    if not all(found) or len(set(names)) < len(names):
        raise ValueError(
            f"must be different levels from a (all channels) to e (1/16), joined by hyphens: a-c-e in equal "
            f"parts, or a2-e8 in these; got {levels!r}"
        )
    parts = {match[1]: int(match[2] or 1) for match in found if match}
    total = sum(parts.values())
    order = sorted(parts)
    return Mix(tuple(RATES[name] for name in order), tuple(parts[name] / total for name in order))


def _checked(levels: str) -> str:
    mix_of(levels)
    return levels


Levels = Annotated[str, AfterValidator(_checked)]
"""An option with levels, as `mix_of` reads them."""


def window(size: int, rate: float, *, within: float = 1.0, start: int = 0) -> Tensor:
    """Return a bool vector (size,): the channels of a slice.

    Args:
        size: number of channels of the whole layer.
        rate: share of the slice, at most `within`; it has ⌈rate · size⌉ channels.
        within: share that the server's model has, the first ⌈within · size⌉ channels.
        start: the window's first channel, modulo the number that the server has.
    """
    held = channels_at(within, size)
    kept = torch.zeros(size, dtype=torch.bool)
    kept[(start + torch.arange(channels_at(rate, size))) % held] = True
    return kept


@lru_cache(maxsize=CACHED_SLICES)
def slice_mask(
    layout: Layout, groups: tuple[ChannelGroup, ...], rate: float, *, within: float = 1.0, start: int = 0
) -> Mask:
    """Return the mask of a slice; for the same arguments the same object, so that it is sent once.

    Arguments are those of `window`, for each of the model's groups.
    """
    kept = {group.name: window(group.size, rate, within=within, start=start) for group in groups}
    return channel_mask(layout, groups, kept)
