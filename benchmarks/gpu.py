"""Seconds of a round on one GPU, beside a plain loop on the same card.

    python -m benchmarks.gpu [--models cnn resnet18] [--rounds 5] [--actors 2] [--stack 32]

    cnn         60 images of 28×28 a client, 100 of 1,000 clients a round, batch 20
    resnet18    500 images of 3×32×32 a client (CIFAR-10's shapes), 10 of 100 clients a round, batch 32

Images are random, one local epoch of plain SGD. The plain loop has all examples on the card and no data
loader. The contenders are interleaved. Beside the seconds stand the share of the card's bf16 roof (the rate
of a large product of matrices, measured first), and the utilisation that the driver reports.
"""

import argparse
import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks import workload
from benchmarks.round import PlainLoop, State
from fedray.config.run_config import RunConfig
from fedray.experiment.placement import pool_for
from fedray.experiment.run import Federation
from fedray.federation.pool import LocalPool
from fedray.federation.server import Server
from fedray.training.precision import Precision
from fedray.types import Mask

IMAGES = 50_000
NO_GPU = (
    "There is no CUDA device here, so there is nothing to measure: `python -c 'import torch; "
    "print(torch.cuda.is_available())'` says False. On a machine with one, this command prints its table. "
    "`--device cpu` tries the command itself on the processor; its figures say nothing about a GPU."
)


def config(model: str, **changes: object) -> RunConfig:
    """Return the workload of a model, without actors."""
    workload.offer("random_cifar10", IMAGES, (3, 32, 32))
    resnet = {"data.name": "random_cifar10", "clients.population": 100, "clients.cohort": 10}
    own: dict[str, object] = resnet | {"method.batch_size": 32} if model == "resnet18" else {}
    return workload.config(model, actors=0).override(own | changes)


class CardLoop(PlainLoop):
    """FedAvg as one writes it by hand for a GPU: model and examples on the card, batches by index."""

    def __init__(self, run: RunConfig, device: str) -> None:
        super().__init__(run)
        self.x, self.y = self.x.to(device), self.y.to(device)
        self.global_model.to(device)

    def train(self, state: State, clients: list[int]) -> tuple[State, int]:
        """Train clients from `state` one after the other; return the weighted sum and the weight."""
        self.global_model.load_state_dict(state)
        total: State = {name: torch.zeros_like(value) for name, value in state.items()}
        count = 0
        for client in clients:
            rows = torch.from_numpy(np.asarray(self.partition.rows(client), dtype=np.int64)).to(self.y.device)
            local = copy.deepcopy(self.global_model).train()
            optimiser = torch.optim.SGD(local.parameters(), lr=self.lr)
            for batch in torch.split(rows[torch.randperm(len(rows), device=rows.device)], self.batch):
                optimiser.zero_grad()
                torch.autograd.backward(cross_entropy(local(self.x[batch]), self.y[batch]))
                optimiser.step()
            for name, value in local.state_dict().items():
                total[name] += value * len(rows)
            count += len(rows)
        return total, count


@dataclass
class Contender:
    """One of the compared loops, and its measured rounds."""

    name: str
    round: Callable[[int], object]
    seconds: list[float] = field(default_factory=list)
    utilisation: list[float] = field(default_factory=list)


def contenders(model: str, device: str, actors: int, stack: int) -> Iterator[Contender]:
    """Yield the contenders of a model; that with actors only if there are some."""
    yield Contender("plain loop", CardLoop(config(model), device).round)
    variants: list[tuple[int, Precision]] = [
        (1, "fp32"),
        (min(stack, config(model).clients.cohort), "fp32"),
        (1, "bf16"),
    ]
    for clients, precision in variants[: None if device == "cuda" else 2]:
        server = in_process(config(model, **{"clients.stack": clients}), device, precision)
        yield Contender(f"fedray, {clients} at once, {precision}", partial(_step, server.step))
    if actors and device == "cuda":
        shared = {"clients.actors": actors, "clients.resources.gpu": 1 / actors, "clients.stack": 1}
        run = config(model, **shared)
        hosted = workload.server(run, pool_for(run))
        yield Contender(f"fedray, {actors} actors on the card", partial(_step, hosted.step))


def in_process(run: RunConfig, device: str, precision: Precision) -> Server:
    """Return a server that is set up, whose clients train in this process on a device."""
    federation = Federation.of(run)
    # not by the config, which asks the processor whether it has the precision
    place = replace(federation.place, precision=precision)
    server = Server(place, LocalPool(place, device), federation.schedule, federation.side)
    server.setup()
    return server


def _step(step: Callable[[], object], number: int) -> None:
    step()


def roof_flops_per_s(device: str, size: int = 8192, repeats: int = 20) -> float:
    """Return the FLOPs per second of a product of two bf16 matrices (size, size): the best of some."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        with _timed(device) as seconds:
            a @ b
        best = min(best, seconds[0])
    return 2 * size**3 / best


@contextmanager
def _timed(device: str) -> Iterator[list[float]]:
    """Yield a list that holds the seconds of the block after it, the card's work included."""
    seconds: list[float] = []
    _wait(device)
    started = time.perf_counter()
    yield seconds
    _wait(device)
    seconds.append(time.perf_counter() - started)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _sampled(device: str, found: list[float], every_s: float = 0.05) -> Iterator[None]:
    """Append the card's utilisation, in percent, to `found` from a thread; nothing where it is unknown."""
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(every_s):
            try:
                found.append(float(torch.cuda.utilization()))
            except Exception:  # pynvml is missing, or the driver does not tell
                return

    if device != "cuda":
        yield
        return
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def measure(model: str, arguments: argparse.Namespace, roof: float) -> None:
    """Print medians, spreads and ratios for a model; `roof` in FLOPs per second, 0 if it is not known."""
    device = arguments.device
    found = list(contenders(model, device, arguments.actors, arguments.stack))
    for number in range(-arguments.warm_up_rounds, arguments.rounds):
        for contender in found:
            one_round(contender, number, device, measured=number >= 0)
    place = Federation.of(config(model)).place
    examples = config(model).clients.cohort * int(place.population.partition.sizes.mean())
    flops = examples * place.flops.train(Mask.full(place.model.layout))
    plain = statistics.median(found[0].seconds)
    print(f"\n{model}: {examples} images a round, {flops:.3g} FLOPs; medians of {arguments.rounds} rounds")
    print(f"{'':30}{'seconds':>9}{'min … max':>18}{'× plain':>9}{'of roof':>9}{'busy':>7}")
    for one in found:
        median = statistics.median(one.seconds)
        spread = f"{min(one.seconds):.3f} … {max(one.seconds):.3f}"
        busy = f"{statistics.mean(one.utilisation):.0f} %" if one.utilisation else "–"
        share = f"{flops / median / roof:.2%}" if roof else "–"
        print(f"{one.name:30}{median:9.3f}{spread:>18}{plain / median:9.2f}{share:>9}{busy:>7}")


def one_round(contender: Contender, number: int, device: str, *, measured: bool) -> None:
    """Make a round of a contender, and keep its seconds and utilisation if it is measured."""
    utilisation: list[float] = []
    with _sampled(device, utilisation), _timed(device) as seconds:
        contender.round(number + 1_000)
    if measured:
        contender.seconds += seconds
        contender.utilisation += utilisation


def main(given: list[str] | None = None) -> None:
    """Read the arguments and measure; without a GPU, say so."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["cnn", "resnet18"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up-rounds", type=int, default=2)
    parser.add_argument("--actors", type=int, default=2, help="that share the card; 0: none")
    parser.add_argument("--stack", type=int, default=32, help="clients that train together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return
    roof = 0.0
    if arguments.device == "cuda":
        roof = roof_flops_per_s("cuda")
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {roof / 1e12:.0f} TFLOP/s in bf16")
    for model in arguments.models:
        measure(model, arguments, roof)


if __name__ == "__main__":
    main()
