"""The plain loop in two processes makes the rounds of the one in a single process."""

from benchmarks.round import PlainLoop, TwoProcesses
from benchmarks.workload import config


def test_two_processes_train_the_same_number_of_examples():
    run = config("mlp", population=100)
    two = TwoProcesses(run)
    try:
        assert two.round(0) == PlainLoop(run).round(0)
    finally:
        two.close()
