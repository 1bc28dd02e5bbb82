"""fluke: its FedAvg, one process, all in memory; clients keep no model between rounds (`persistency`).

An observer of the federation waits before each round until the round is asked for.
"""

import copy
from typing import Any

from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver
from torch import nn

from benchmarks.peers.line import Line
from benchmarks.peers.task import CountedLoss, Task, load

CLASSES = 10
EVER = 1_000_000


class Paced(FederationObserver):
    """Begins a round when it is asked to."""

    def __init__(self, line: Line, task: Task) -> None:
        self.line, self.task = line, task

    def start_round(self, round: int, global_model: nn.Module) -> None:
        """Wait for the round."""
        if round == 1:
            self.line.ready(["fluke-fl", "torch"])
        self.line.wait_for_round(lambda: self.task.accuracy(global_model))

    def end_round(self, round: int) -> None:
        """Say that the round is over."""
        self.line.answer(examples=CountedLoss.take())


def hyper_parameters(task: Task) -> DDict:
    """Return fluke's configuration of the algorithm."""
    client: dict[str, Any] = {
        "batch_size": task.batch,
        "local_epochs": 1,
        "loss": CountedLoss,
        "optimizer": {"name": "SGD", "lr": task.lr},
        "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
        "persistency": False,
    }
    return DDict(client=client, server={"weighted": True}, model=copy.deepcopy(task.model))


def serve(line: Line, folder: str) -> None:
    """Make rounds."""
    task = load(folder)
    FlukeENV().set_eval_cfg(server=False, locals=False, pre_fit=False, post_fit=False)
    loaders = [
        FastDataLoader(task.x[rows], task.y[rows], num_labels=CLASSES, batch_size=task.batch, shuffle=True)
        for rows in task.clients
    ]
    container = DummyDataContainer(loaders, [None] * len(loaders), None, CLASSES)
    federation = FedAVG(len(loaders), DataSplitter(container), hyper_parameters(task))
    federation.set_callbacks(Paced(line, task))
    federation.run(n_rounds=EVER, eligible_perc=(task.cohort + 0.5) / len(loaders), finalize=False)
