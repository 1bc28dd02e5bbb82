"""pfl-research: FederatedAveraging on its SimulatedBackend, one process, PyTorch.

A callback after each central iteration says that the round is over and waits for the next one.
"""

import copy
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.peers.line import Line
from benchmarks.peers.task import CountedLoss, Task, load

EVER = 1_000_000


class Classifier(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.loss_of = network, CountedLoss()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a training batch."""
        self.train()
        loss: Tensor = self.loss_of(self.network(x), y)
        return loss

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return the sum of correct answers; pfl evaluates the first cohort."""
        self.eval()
        with torch.no_grad():
            right = (self.network(x).argmax(1) == y).sum().item()
        return {"accuracy": Weighted(right, len(y))}


class Paced(TrainingProcessCallback):
    """Begins a round when it is asked to."""

    def __init__(self, line: Line, task: Task, network: nn.Module) -> None:
        self.line, self.task, self.network = line, task, network

    def wait(self) -> Metrics:
        """Wait for the next round."""
        self.line.wait_for_round(lambda: self.task.accuracy(self.network))
        return Metrics()

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Wait for the first round."""
        self.line.ready(["pfl", "torch"])
        return self.wait()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Say that the round is over, and wait for the next one."""
        self.line.answer(examples=CountedLoss.take())
        return False, self.wait()


def serve(line: Line, folder: str) -> None:
    """Make rounds."""
    task = load(folder)
    network = copy.deepcopy(task.model)
    classifier = Classifier(network)

    def examples(client: int) -> Dataset:
        rows = task.clients[client]
        rows = rows[torch.from_numpy(np.random.permutation(len(rows)))]  # pfl goes through them in order
        return Dataset((task.x[rows], task.y[rows]), user_id=str(client))

    clients = FederatedDataset(examples, get_user_sampler("random", range(len(task.clients))))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=EVER,
            evaluation_frequency=EVER,
            train_cohort_size=task.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(clients, clients, postprocessors=[WeightByDatapoints()]),
        PyTorchModel(
            classifier,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(classifier.parameters(), lr=1.0),
        ),
        NNTrainHyperParams(local_learning_rate=task.lr, local_num_epochs=1, local_batch_size=task.batch),
        callbacks=[Paced(line, task, network)],
    )
