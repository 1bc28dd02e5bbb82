"""The plain loop and fedray, as `benchmarks.round` has them."""

from benchmarks.peers.line import Line
from benchmarks.peers.task import load
from benchmarks.peers.workloads import run_config
from benchmarks.round import CONTENDERS


def serve(line: Line, folder: str, name: str) -> None:
    """Make the rounds of a contender of `benchmarks.round`."""
    task = load(folder)
    contender = CONTENDERS[name](run_config(task.name, task.checking))
    line.ready(["torch", "ray"] if "Ray" in name else ["torch"])
    number = 0
    try:
        while True:
            line.wait_for_round(lambda: task.accuracy(contender.model()))
            line.answer(examples=contender.round(number))
            number += 1
    finally:
        contender.close()
