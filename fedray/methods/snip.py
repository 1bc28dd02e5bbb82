"""SNIP: single-shot network pruning based on connection sensitivity.  Lee et al., ICLR 2019.

Before the first round some clients compute the gradient of the loss at the initial weights on their own
examples. The server adds the gradients up, scores each weight by |g·w|, and keeps the best for the whole run.

Differs from the paper: it runs in a federation, so the batch is the union of the scorers' examples, one
client at a time (sums of gradients are sums over that union); the initialisation is the model's, not variance
scaling; the score is global over all prunable weights, as in the paper.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedray.errors import MethodError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.pruning.masks import top_k
from fedray.pruning.scores import sensitivity
from fedray.types import ClientUpdate, Density, Mask, PositiveInt, ServerState, Task


@dataclass(frozen=True, kw_only=True)
class SNIP(Method[None]):
    """One mask before training, from the clients' gradients.

    Args:
        density: share of the prunable weights that is kept.
        scorers: clients that compute a gradient; each uploads one dense vector, which is charged.
    """

    citation: ClassVar[str] = "Lee et al., ICLR 2019"
    prunes: ClassVar[bool] = True

    density: Density = 0.1
    scorers: PositiveInt = 10

    @property
    def target(self) -> float | None:
        """The option `density`."""
        return self.density

    def setup(self, state: ServerState[None], ctx: ServerContext) -> ServerState[None]:
        """Ask for gradients; keep the weights with the highest scores."""
        task = Task(state.params, state.mask)
        scored: CohortUpdate = ctx.ask(self.score, {client: task for client in ctx.sample(self.scorers)})
        if not scored.folded:
            raise MethodError(
                f"the gradients of all {len(scored.records)} scorers are not finite: check the data and model"
            )
        gradient = scored.sum("gradient") / scored.num_examples
        scores = sensitivity(ctx.model.forward_params(state.params, state.mask), gradient)
        return replace(state, mask=top_k(scores, self.density, ctx.layout, min_layer=self.min_layer))

    def score(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: the gradient at the initial weights, summed over the client's examples."""
        gradient = client.grad(task.params, task.mask) * client.num_examples
        return ClientUpdate(task.params, Mask.none(task.mask.layout), sums={"gradient": gradient})
