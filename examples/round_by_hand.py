"""One round of FedAvg on a pruned model, first with plain loops, then by fedray's server: the same numbers.

    python examples/round_by_hand.py

By hand there is nothing but torch: for each client, copy the model, descend on batches, put zeros back where
the mask is False; then average by numbers of examples. Data, model and mask are fedray's, and so is the order
in which a client sees its examples, which depends on (seed, round, client) alone.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedray import MODELS, Federation, RunConfig, Server, ServerState
from fedray.federation.pool import LocalPool
from fedray.federation.server import Checkpoint
from fedray.federation.worker import client_generator
from fedray.pruning.masks import top_k
from fedray.pruning.scores import magnitude

Weights = dict[str, Tensor]

EPOCHS, LR, BATCH, SEED, ROUND = 2, 0.1, 20, 0, 1
CONFIG = RunConfig.from_tree(
    {
        "rounds": 1,
        "seed": SEED,
        "model": "mlp",
        "data": {"name": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5}},
        "clients": {"population": 20, "cohort": 5, "actors": 0},
        "method": {"name": "fedavg", "local_epochs": EPOCHS, "lr": LR, "batch_size": BATCH},
        "tracking": {"uri": "none"},
    }
)


def train(model: nn.Module, mask: Weights, x: Tensor, y: Tensor, client: int) -> Weights:
    """Return a client's weights: plain SGD, and zeros where the mask says so."""
    model = deepcopy(model)
    rng = client_generator(SEED, ROUND, client)()
    for _ in range(EPOCHS):
        for rows in torch.split(torch.from_numpy(rng.permutation(len(y))), BATCH):
            loss = cross_entropy(model(x[rows]), y[rows])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
                    weight.sub_(LR * gradient).mul_(mask[name])
    return {name: weight.detach() for name, weight in model.named_parameters()}


def main() -> None:
    """Make the round twice and compare."""
    federation = Federation.of(CONFIG)
    place, data = federation.place, federation.place.dataset
    initial = place.model.init(SEED)
    mask = top_k(magnitude(initial), 0.2, initial.layout)  # 20 % of the prunable weights stay

    # by fedray: the six steps of Server.step()
    start = Checkpoint(ServerState(ROUND, initial, mask))
    server = Server(place, LocalPool(place), federation.schedule, federation.side, start)
    report = server.step()

    # by hand, with the clients that the server drew
    model = MODELS["mlp"].build(data.input_shape, data.num_classes)
    model.load_state_dict(initial.masked(mask))
    sizes = {record.client: record.num_examples for record in report.clients if record.fate == "folded"}
    mean = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for client, size in sizes.items():
        rows = place.population.partition.rows(client)
        x, y = data.normalise(data.train.x[rows]), torch.from_numpy(data.train.y[rows])
        for name, weight in train(model, dict(mask), x, y, client).items():
            mean[name] += size / sum(sizes.values()) * weight
    model.load_state_dict(mean)

    validation = federation.side.validation
    right = model(data.normalise(validation.x)).argmax(1) == torch.from_numpy(validation.y)
    print(f"clients and their numbers of examples: {sizes}; {mask.density:.0%} of the prunable weights held")
    print(f"by hand   accuracy {right.float().mean():.4f}   norm {norm(mean):.6f}")
    print(f"by fedray accuracy {report.metrics['val/accuracy']:.4f}   norm {norm(dict(server.model)):.6f}")
    difference = max(float((mean[name] - weight).abs().max()) for name, weight in server.model.items())
    print(f"largest difference of a weight: {difference:.1e}")
    assert difference < 1e-6


def norm(weights: Weights) -> float:
    """Return the Euclidean norm of all weights together."""
    return float(torch.cat([weight.flatten() for weight in weights.values()]).norm())


if __name__ == "__main__":
    main()
