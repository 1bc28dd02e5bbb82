"""How rounds scale with clients, cohort, chunks, actors, nodes, model, density and rounds: seconds, memory.

    python -m benchmarks.scaling [--axes registered cohort …] [--rounds 5] [--out scaling.json]
    python -m benchmarks.scaling --picture docs/scaling.png --of scaling.json
    python -m benchmarks.scaling --model --of scaling.json

Each point has its process (with actors also its Ray, with nodes several raylets of one CPU), and the points
of an axis make their rounds in turn. Clients hold 60 images of 28×28 each. Memory is the proportional set
size of the process tree. `--model` fits the costs of a round to these runs and predicts others.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.cost_model import Plan, Run, fit, pass_s, predict
from benchmarks.processes import memory_by_name, tree_memory_bytes
from benchmarks.workload import config, server
from fedray.config.run_config import RunConfig
from fedray.experiment.placement import pool_for


@dataclass(frozen=True)
class Point:
    """A configuration: 0 nodes are a local Ray, or this process without actors."""

    registered: int = 1_000
    cohort: int = 100
    chunk: int | None = None
    actors: int = 0
    nodes: int = 0
    model: str = "mlp"
    density: float = 1.0

    @property
    def chunks(self) -> int:
        """The number of chunks of the cohort."""
        return -(-self.cohort // (self.chunk or -(-self.cohort // 16)))

    def config(self) -> RunConfig:
        """Return the run: all clients draw from the same images, so that there may be any number of them."""
        changes: dict[str, object] = {
            "data.partition": {"kind": "bootstrap", "examples": 60},
            "clients.cohort": self.cohort,
            "clients.chunk": self.chunk,
        }
        if self.density < 1:
            masked = {"name": "staged", "density": self.density, "initial_density": self.density}
            changes |= {f"method.{key}": value for key, value in masked.items()}
        return config(self.model, self.registered, self.actors, **changes)


BASE = Point(registered=100_000)
AXES: dict[str, list[Point]] = {
    "registered": [replace(BASE, registered=10**power) for power in (3, 4, 5, 6, 7, 8)],
    "cohort": [replace(BASE, cohort=cohort, chunk=-(-cohort // 16)) for cohort in (100, 400, 1_600)],
    "chunks": [replace(BASE, cohort=400, chunk=chunk) for chunk in (25, 4, 1)],
    "actors": [replace(BASE, cohort=400, chunk=25, actors=actors) for actors in (1, 2, 3)],
    "cohort on Ray": [replace(BASE, cohort=n, chunk=n // 16, actors=2) for n in (160, 400, 1_600)],
    "nodes": [replace(BASE, cohort=400, chunk=25, actors=n, nodes=n) for n in (1, 2, 3, 4)],
    "model": [replace(BASE, cohort=32, model=model) for model in ("lenet5", "mlp", "cnn")],
    "density": [replace(BASE, density=density) for density in (1.0, 0.5, 0.1)],
    "largest": [replace(BASE, registered=1_000_000, cohort=10_000)],
}
LABEL = {"cohort on Ray": "cohort", "largest": "cohort"}


def _cluster(nodes: int) -> Any:
    """Start raylets of one CPU each, and connect to them."""
    from fedray.experiment.cluster import import_ray, without_extras

    ray = import_ray()
    from ray.cluster_utils import Cluster

    with without_extras():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster


def _serve(connection: Connection, point: Point) -> None:
    cluster = _cluster(point.nodes) if point.nodes else None
    run = point.config()
    federation = server(run, pool_for(run))
    connection.send(federation.place.model.layout.size)
    while connection.recv() == "round":
        start, cpu = time.perf_counter(), time.thread_time()
        federation.step()
        connection.send((time.perf_counter() - start, time.thread_time() - cpu))
    connection.send(memory_by_name(os.getpid()))
    federation.pool.close()
    if cluster is not None:
        import ray

        ray.shutdown()
        cluster.shutdown()


def measure(points: Sequence[Point], rounds: int) -> list[tuple[Run, list[float]]]:
    """Make rounds of all points in turn; return the runs, and the seconds of their rounds."""
    context = multiprocessing.get_context("spawn")
    ends: list[tuple[Connection, int]] = []
    for point in points:
        here, there = context.Pipe()
        context.Process(target=_serve, args=(there, point)).start()
        ends.append((here, here.recv()))
    times: list[list[tuple[float, float]]] = [[] for _ in points]
    for number in range(rounds + 1):
        for (end, _), taken in zip(ends, times, strict=True):
            end.send("round")
            taken += [end.recv()] if number else [end.recv()][:0]
    found = []
    for point, (end, weights), taken in zip(points, ends, times, strict=True):
        end.send("end")
        wall, cpu = zip(*taken, strict=True)
        shape = (point.cohort, point.chunks, point.actors, max(1, point.nodes), weights, point.registered)
        found.append((Run(*shape, statistics.median(wall), statistics.median(cpu), end.recv()), list(wall)))
    return found


def _shown(axis: str, points: Sequence[Point], runs: Sequence[tuple[Run, list[float]]]) -> None:
    name = LABEL.get(axis, axis)
    print(
        f"\n{axis}\n{name:>12}{'seconds':>10}{'min … max':>18}{'×':>7}{'driver CPU s':>14}{'MB':>8}{'×':>7}"
    )
    first = runs[0][0]
    for point, (run, wall) in zip(points, runs, strict=True):
        value = getattr(point, name)
        label = f"{value:,}" if isinstance(value, int) else str(value)
        spread = f"{min(wall):.3f} … {max(wall):.3f}"
        print(
            f"{label:>12}{run.seconds:10.3f}{spread:>18}{run.seconds / first.seconds:7.2f}"
            f"{run.driver_s:14.4f}{run.bytes / 1e6:8,.0f}{run.bytes / first.bytes:7.2f}",
            flush=True,
        )
    if any(point.actors for point in points):
        for process, sizes in runs[-1][0].memory.items():
            print(f"{'':12}{process}: {', '.join(f'{size / 1e6:.0f}' for size in sizes)} MB")


def long_run(rounds: int) -> list[tuple[int, float, float]]:
    """Make rounds in this process; return (round, median seconds of the last tenth, MB) ten times."""
    run = BASE.config()
    federation, found, taken = server(run, pool_for(run)), [], list[float]()
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        federation.step()
        taken.append(time.perf_counter() - start)
        if number % max(1, rounds // 10) == 0:
            size = tree_memory_bytes(os.getpid())
            found.append((number, statistics.median(taken), size / 1e6))
            taken.clear()
    return found


def show_model(runs: Sequence[Run]) -> None:
    """Print the fitted costs, predictions beside what was measured, and predictions for larger rounds."""
    weights = next(run.weights for run in runs if run.nodes > 1)
    cores = len(os.sched_getaffinity(0))
    costs = fit(runs, weights, pass_s(RESNET18))
    print(f"\n{cores} cores; fitted, in microseconds of a core (per weight: picoseconds)")
    print(
        {
            name: round(value * (1e12 if name == "weight_s" else 1e6), 1)
            for name, value in asdict(costs).items()
        }
    )
    print(f"\n{'actors':>8}{'nodes':>7}{'cohort':>8}{'predicted':>11}{'measured':>10}{'ratio':>7}")
    for run in (run for run in runs if run.actors and run.weights == weights):
        plan = Plan(run.cohort, run.chunks, run.actors, 1, weights, cores)
        expected = predict(costs, plan)["round"]
        print(
            f"{run.actors:8}{run.nodes:7}{run.cohort:8,}{expected:11.3f}{run.seconds:10.3f}"
            f"{run.seconds / expected:7.2f}"
        )
    print("\n64 nodes of 16 actors, predicted seconds of a round (links of 10 Gbit/s; not measured)")
    print(f"{'weights':>12}{'cohort':>9}{'chunks':>8}{'tree':>6}", *(f"{n:>10}" for n in PARTS))
    for size in (weights, RESNET18):
        scaled = replace(costs, trained_s=costs.trained_s * size / weights)
        for cohort, chunks, tree in ((10_000, 16, True), (10_000, 1_250, False), (10_000, 1_250, True)):
            found = predict(scaled, Plan(cohort, chunks, 1024, 64, size, tree=tree))
            print(f"{size:12,}{cohort:9,}{chunks:8,}{tree!s:>6}", *(f"{found[n]:10.3f}" for n in PARTS))


RESNET18 = 11_183_562
"""Weights of a ResNet-18 of ten classes."""
PARTS = ("driver", "training", "fold", "network", "round")


def picture(found: dict[str, Any], path: Path) -> None:
    """Draw seconds and memory of a round, relative to the first point of each axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from fedray.report.canvas import GREY
    from fedray.report.colours import COLOURS

    axes = [name for name in AXES if name in found and len(found[name]) > 1]
    figure = Figure(figsize=(9, 4.4), dpi=80)
    FigureCanvasAgg(figure)
    for number, name in enumerate(axes):
        plot = figure.add_subplot(2, -(-len(axes) // 2), number + 1)
        points = AXES[name][: len(found[name])]
        x = [
            getattr(point, LABEL.get(name, name)) if name != "model" else i for i, point in enumerate(points)
        ]
        runs = [Run(**each) for each in found[name]]
        for label, values, color in (
            ("seconds", [run.seconds for run in runs], COLOURS["staged"][0]),
            ("memory", [run.bytes for run in runs], COLOURS["snip"][0]),
        ):
            plot.plot(
                x, [value / values[0] for value in values], "o-", color=color, label=label, markersize=3
            )
        if name not in ("actors", "nodes", "model", "density"):
            plot.set_xscale("log")
        labels = [str(getattr(point, LABEL.get(name, name))) for point in points]
        plot.xaxis.set_minor_locator(NullLocator())
        plot.set_xticks(x, [f"10^{len(label) - 1}" if len(label) > 5 else label for label in labels])
        plot.set_title(name, fontsize=9)
        plot.set_ylim(bottom=0)
        plot.tick_params(labelsize=7, colors=GREY)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.supylabel("× the first point", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Read the arguments; measure, fit or draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "rounds"], default=[])
    parser.add_argument(
        "--rounds", type=int, default=5, help="of each point; `--axes rounds` makes 100 times as many"
    )
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    parser.add_argument("--of", type=Path, help="measured before")
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    source = arguments.of or arguments.out
    found: dict[str, Any] = json.loads(source.read_text("utf-8")) if source.exists() else {}
    wanted = arguments.axes or ([] if arguments.of else [*AXES, "rounds"])
    for axis in wanted:
        if axis == "rounds":
            for number, seconds, size in long_run(100 * arguments.rounds):
                print(f"round {number:6,}: {seconds:.3f} s, {size:,.0f} MB", flush=True)
            continue
        points = AXES[axis]
        batches = [[point] for point in points] if axis == "nodes" else [points]
        runs = [run for batch in batches for run in measure(batch, arguments.rounds)]
        _shown(axis, points, runs)
        found[axis] = [asdict(run) for run, _ in runs]
        arguments.out.write_text(json.dumps(found, indent=1), "utf-8")
    if arguments.picture:
        picture(found, arguments.picture)
    if arguments.model:
        show_model([Run(**each) for runs in found.values() for each in runs])


if __name__ == "__main__":
    main()
