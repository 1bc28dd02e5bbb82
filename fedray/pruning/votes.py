"""Growing by vote: clients name the entries that they would grow, and the server counts.

A vote is what a client sends: where the gradient is largest outside the mask, and what it is there. That is a
few numbers in place of a dense gradient.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedray.pruning.masks import grow
from fedray.types import Mask

Vote = Mapping[str, Tensor]
"""`positions`, int32 (n,), ascending, and `gradient`, float32 (n,)."""


def cast(gradient: Tensor, count: int, mask: Mask) -> dict[str, Tensor]:
    """Return a client's vote: the prunable entries outside the mask with the largest |gradient|.

    Args:
        gradient: (size,). What is not a number gets no vote before all others have one: an update of a
            training that diverged is left out for its params, and is not an error here.
        count: how many, at least 0; fewer if fewer are outside.
        mask: what is held.
    """
    finite = gradient.nan_to_num(0.0, 0.0, 0.0)
    best = grow(finite.abs(), count, mask.layout, within=mask)
    positions = (best.flat & ~mask.flat).nonzero().squeeze(1)
    return {"positions": positions.int(), "gradient": finite[positions]}


def tally(votes: Iterable[tuple[int, Vote]], mask: Mask) -> Tensor:
    """Return |Σ n·g| (size,) over those who voted for an entry: what `grow` ranks.

    Entries of the mask count −1, so that what has just been removed does not come back for want of votes.

    Args:
        votes: number of examples, and vote, of each client, in order.
        mask: outside of which they voted.
    """
    total = torch.zeros(mask.layout.size)
    for examples, vote in votes:
        total.index_add_(0, vote["positions"], vote["gradient"], alpha=examples)
    return torch.where(mask.flat, -1.0, total.abs())
