"""Growing by vote: clients name the entries that they would grow, and the server counts.

A client's vote holds the positions outside the mask at which its gradient is largest, and the gradient there:
a few numbers in place of a dense gradient.
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
        gradient: (size,). NaN and infinity count as zero, so all other entries come first. They are no error
            here: the update of a training that diverged is left out for its params.
        count: number of entries, ≥ 0; fewer if fewer are outside.
        mask: the current mask.
    """
    finite = gradient.nan_to_num(0.0, 0.0, 0.0)
    best = grow(finite.abs(), count, mask.layout, within=mask)
    positions = (best.flat & ~mask.flat).nonzero().squeeze(1)
    return {"positions": positions.int(), "gradient": finite[positions]}


def tally(votes: Iterable[tuple[int, Vote]], mask: Mask) -> Tensor:
    """Return |Σ n·g| (size,) over the clients that voted for an entry, as scores for `grow`.

    Entries of the mask count −1, so that entries that were just removed do not return for want of votes.

    Args:
        votes: (number of examples, vote) of each client, in order.
        mask: mask that the votes are outside of.
    """
    total = torch.zeros(mask.layout.size)
    for examples, vote in votes:
        total.index_add_(0, vote["positions"], vote["gradient"], alpha=examples)
    return torch.where(mask.flat, -1.0, total.abs())
