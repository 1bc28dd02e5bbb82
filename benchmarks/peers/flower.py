"""Flower: its message API on its simulation runtime, two Ray workers of one CPU each.

As in Flower's PyTorch quickstart: a ClientApp that trains with DataLoader and optim.SGD, a ServerApp with the
strategy FedAvg, `run_simulation`. The strategy waits before each round until the round is asked for.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.line import Ended, Line
from benchmarks.peers.task import CountedLoss, Task, load

BACKEND: dict[str, Any] = {
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    "init_args": {"num_cpus": 2},
}
EVER = 1_000_000

client_app = ClientApp()


@client_app.train()  # type: ignore[untyped-decorator, unused-ignore]
def train(message: Message, context: Context) -> Message:
    """Train on the client's examples for one epoch; return the weights."""
    torch.set_num_threads(1)
    task = load(str(message.content["config"]["folder"]))
    model, loss_of = copy.deepcopy(task.model), CountedLoss()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = task.clients[int(context.node_config["partition-id"])]
    loader = DataLoader(TensorDataset(task.x[rows], task.y[rows]), batch_size=task.batch, shuffle=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=task.lr)
    model.train()
    for x, y in loader:
        optimiser.zero_grad()
        loss_of(model(x), y).backward()
        optimiser.step()
    arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": CountedLoss.take()})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Paced(FedAvg):
    """FedAvg that begins a round when it is asked to."""

    def __init__(self, line: Line, task: Task) -> None:
        population = len(task.clients)
        super().__init__(
            fraction_train=(task.cohort + 0.5) / population,
            fraction_evaluate=0.0,
            min_available_nodes=population,
        )
        self.line, self.task, self.examples = line, task, 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Say that the last round is over, and wait for the next one."""
        if server_round == 1:
            self.line.ready(["flwr", "ray", "torch"])
        else:
            self.line.answer(examples=self.examples)
        self.line.wait_for_round(lambda: self.accuracy(arrays))
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the weights, and count the examples."""
        arrived = list(replies)
        self.examples = sum(
            int(reply.content["metrics"]["num-examples"]) for reply in arrived if reply.has_content()
        )
        averaged: tuple[Any, Any] = super().aggregate_train(server_round, arrived)
        return averaged

    def accuracy(self, arrays: ArrayRecord) -> float:
        """Return the accuracy of the global weights."""
        model = copy.deepcopy(self.task.model)
        model.load_state_dict(arrays.to_torch_state_dict())
        return self.task.accuracy(model)


def serve(line: Line, folder: str) -> None:
    """Make rounds."""
    task, server_app = load(folder), ServerApp()

    @server_app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        Paced(line, task).start(
            grid=grid,
            initial_arrays=ArrayRecord(task.model.state_dict()),
            num_rounds=EVER,
            train_config=ConfigRecord({"folder": folder}),
        )

    try:
        run_simulation(server_app, client_app, num_supernodes=len(task.clients), backend_config=BACKEND)
    except RuntimeError as error:
        if not isinstance(error.__cause__, Ended):
            raise
