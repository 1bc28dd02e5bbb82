"""A random mask, drawn once: the control for methods that choose weights.  Liu et al., 2022; Evci et al.,
2020.

Before the first round the server draws the weights that stay, for the whole run: FedAvg under a static mask.
The densities of the layers follow Erdős–Rényi-Kernel (higher in small layers), or are equal. A method that
scores, searches or regrows has to beat this at the same density.

Differs from the paper (Liu et al., "The unreasonable effectiveness of random pruning", ICLR 2022; the layers'
densities by Evci et al., "Rigging the lottery", ICML 2020): it runs in a federation, and all clients share
the one mask. The classifier is not prunable, and not counted in the density.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedray.federation.method import Method, ServerContext
from fedray.pruning.masks import erk, random
from fedray.types import Density, ServerState


@dataclass(frozen=True, kw_only=True)
class RandomMask(Method[None]):
    """One random mask before training.

    Args:
        density: share of the prunable weights that is kept.
        distribution: of that density over the layers: `erk`, in proportion to Σ dims / Π dims; or `uniform`,
            the same in each.
    """

    citation: ClassVar[str] = "Liu et al., ICLR 2022; Evci et al., ICML 2020"
    prunes: ClassVar[bool] = True

    density: Density = 0.1
    distribution: Literal["erk", "uniform"] = "erk"

    @property
    def target(self) -> float | None:
        """The option `density`."""
        return self.density

    def setup(self, state: ServerState[None], ctx: ServerContext) -> ServerState[None]:
        """Draw the mask."""
        if self.distribution == "erk":
            densities = erk(ctx.layout, self.density)
        else:
            densities = dict.fromkeys(ctx.layout.prunable_names, self.density)
        return replace(state, mask=random(ctx.layout, densities, ctx.rng, min_layer=self.min_layer))
