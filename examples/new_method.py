"""FedProx: clients stay near the model they were sent.  A method outside the package, in one file.

Federated optimization in heterogeneous networks.  Li et al., MLSys 2020.

    fedray run tune_configs/quickstart.yaml --import examples/new_method.py method.name=fedprox method.mu=0.01

Clients with unlike data train models that differ. FedProx keeps each client near the model it was sent: the
local loss gets a proximal term, mu/2 · ‖w − w_sent‖². The rest of the round is FedAvg's, so this is one hook.

Differs from the paper: all clients make the same number of epochs (there slow ones stop early), and are drawn
uniformly and averaged by their numbers of examples (there drawn by these numbers, and averaged alike).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedray import METHODS, Client, ClientUpdate, Method, NonNegativeFloat, Step, Task


@dataclass(frozen=True, kw_only=True)
class FedProx(Method):
    """FedAvg whose clients stay near the model that they receive.

    Args:
        mu: weight of the proximal term; 0 is FedAvg.
    """

    citation: ClassVar[str] = "Li et al., MLSys 2020"

    mu: NonNegativeFloat = 0.01

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: masked local SGD on the loss with the proximal term."""

        def proximal(step: Step) -> Tensor:
            distances = [
                (w - task.params[name].to(w.device)).square().sum() for name, w in step.weights.items()
            ]
            return cross_entropy(step.logits, step.y) + self.mu / 2 * torch.stack(distances).sum()

        return ClientUpdate(client.sgd(task.params, task.mask, loss=proximal), task.mask)


METHODS["fedprox"] = FedProx
