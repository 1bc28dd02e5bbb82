"""An outage of the tracking server loses nothing: a real server behind a proxy that fails."""

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.sweeps.sync import sync
from fedray.tracking import sender
from fedray.tracking import store as stores
from fedray.tracking.sent import SENT
from fedray.types import RoundReport
from tests.experiment import tiny
from tests.tracking.servers import Proxy, mlflow_server

ROUNDS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture
def proxy(server: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(stores, "ANSWER_S", 60.0)  # a busy machine is no outage
    proxy = Proxy(server)
    yield proxy
    proxy.mend()
    proxy.shutdown()
    proxy.server_close()


def config(proxy: Proxy, rounds: int = ROUNDS) -> Any:
    experiment = f"x{proxy.server_port}"
    return tiny.config({"rounds": rounds, "tracking.uri": proxy.uri, "tracking.experiment": experiment})


def runs(proxy: Proxy) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(proxy.upstream)
    experiment = client.get_experiment_by_name(f"x{proxy.server_port}")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def check(proxy: Proxy, path: Path, status: str = "FINISHED", rounds: int = ROUNDS) -> Any:
    """Assert that the store has each point of a run's files once, and return the run."""
    from mlflow import MlflowClient

    client = MlflowClient(proxy.upstream)
    (run,) = runs(proxy)
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(rounds + 1))
    expected = Counter(
        (name, line["round"])
        for line in lines
        for name, value in line["metrics"].items()
        if value is not None
    )
    if status == "FINISHED":
        result = json.loads((path / "result.json").read_text())
        expected |= Counter(
            (name, rounds) for name, value in result.items() if "/" in name and type(value) in (int, float)
        )
    history = [
        (key, point) for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)
    ]
    seen = Counter((key, point.step) for key, point in history)
    assert {k: n for k, n in seen.items() if n > 1} == {}
    assert seen.keys() == expected.keys()
    values = {(name, line["round"]): value for line in lines for name, value in line["metrics"].items()}
    for key, point in history:
        # a round that a kill dropped from the files is repeated: all but its clocks is the same
        if (key, point.step) in values and not key.endswith("wall_s"):
            assert values[key, point.step] == point.value
    assert run.info.status == status
    assert run.data.params["method.name"] == "fedavg"
    return run


def complete(proxy: Proxy, path: Path) -> None:
    """Assert that a finished run is in the store with its files, and that `sync` finds nothing to add."""
    from mlflow import MlflowClient

    run = check(proxy, path)
    files = {file.path for file in MlflowClient(proxy.upstream).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "rounds.jsonl", "result.json", "model.safetensors"} <= files
    known = json.loads((path / "mlflow.json").read_text())
    assert known["is_complete"] and known["run_id"] == run.info.run_id
    assert not (path / SENT).exists()
    (again,) = sync(path)
    assert again.points == 0
    check(proxy, path)


def at(rounds: dict[int, Callable[[], object]], pause_s: float = 0.0) -> Callable[[RoundReport], None]:
    """Return an `on_round` that makes calls after some rounds, and a pause after each."""

    def on_round(report: RoundReport) -> None:
        time.sleep(pause_s)
        rounds.get(report.round, lambda: None)()

    return on_round


def fails(proxy: Proxy, state: Any, *, only: str = "", times: int = -1) -> Callable[[], None]:
    def change() -> None:
        proxy.state, proxy.only, proxy.times = state, only, times

    return change


@pytest.mark.parametrize("state", ["gone", "500", "503", "drops"])
def test_a_server_that_fails_after_round_3_and_comes_back(state: Any, proxy: Proxy, in_tmp: Path) -> None:
    fedray.run(config(proxy), out="r", on_round=at({3: fails(proxy, state), 6: proxy.mend}, 0.1))
    complete(proxy, in_tmp / "r")
    assert not (in_tmp / "r" / "warnings.txt").exists()


def test_a_server_that_hangs_costs_no_round_any_time(
    proxy: Proxy, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "ANSWER_S", 1.0)
    ends: list[float] = []

    def on_round(report: RoundReport) -> None:
        ends.append(time.monotonic())
        if report.round == 2:
            proxy.state = "hangs"

    fedray.run(config(proxy), out="r", on_round=on_round)
    done = time.monotonic()
    longest = max(after - before for before, after in itertools.pairwise(ends))
    assert longest < 10.0  # a tiny round takes some hundredths, a request that hangs 30 s
    assert done - ends[-1] < 20.0  # the wait at the end, and the test of the model
    assert "sent when it answers again" in (in_tmp / "r" / "warnings.txt").read_text()
    proxy.mend()
    sync("r")
    complete(proxy, in_tmp / "r")


@pytest.mark.parametrize("path", ["runs/create", "runs/log-batch", "runs/update", "runs/set-tag"])
def test_an_answer_that_is_lost_after_the_call_was_carried_out(path: str, proxy: Proxy, in_tmp: Path) -> None:
    fails(proxy, "drops", only=path, times=2)()
    fedray.run(config(proxy), out="r")
    complete(proxy, in_tmp / "r")


def test_a_server_that_is_down_at_the_start_and_comes_back(proxy: Proxy, in_tmp: Path) -> None:
    proxy.state = "gone"
    seen: list[bool] = []
    known = in_tmp / "r" / "mlflow.json"
    fedray.run(
        config(proxy),
        out="r",
        on_round=at({2: lambda: seen.append(known.exists()), 3: proxy.mend, 8: lambda: time.sleep(1)}, 0.05),
    )
    assert seen == [False] and known.exists()
    complete(proxy, in_tmp / "r")


def test_a_server_that_is_down_until_the_end(proxy: Proxy, in_tmp: Path) -> None:
    proxy.state = "gone"
    fedray.run(config(proxy), out="r")
    assert runs(proxy) == []
    proxy.mend()
    assert sync("r")[0].status == "FINISHED"
    complete(proxy, in_tmp / "r")


def test_an_interrupted_run_ends_as_killed_and_is_resumed(proxy: Proxy, in_tmp: Path) -> None:
    proxy.state = "gone"
    with pytest.raises(KeyboardInterrupt):
        fedray.run(config(proxy), out="r", on_round=tiny.ending(4, KeyboardInterrupt))
    proxy.mend()
    assert sync("r")[0].status == "KILLED"
    check(proxy, in_tmp / "r", "KILLED", 4)
    fedray.resume("r")
    complete(proxy, in_tmp / "r")


def test_rounds_that_wait_are_sent_together(proxy: Proxy, in_tmp: Path) -> None:
    """A slow server catches up: fewer calls than rounds."""

    def slow() -> None:
        proxy.delay_s = 0.3

    fedray.run(config(proxy, 60), out="r", on_round=at({1: slow}))
    calls = [path for path in proxy.requests if path.endswith("runs/log-batch")]
    assert len(calls) < 30
    proxy.mend()
    check(proxy, in_tmp / "r", rounds=60)
    complete_or_synced = sync("r")
    assert complete_or_synced[0].points == 0


def killed(proxy: Proxy, round: int, after_s: float = 0.0) -> None:
    """Run in a child that kills itself `after_s` after a round."""
    child = os.fork()
    if child == 0:

        def die() -> None:
            time.sleep(after_s)
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            fedray.run(config(proxy), out="r", on_round=at({round: die}))
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


@pytest.mark.parametrize("state", ["slow", "drops"])
def test_a_driver_that_is_killed_while_the_server_is_slow(state: str, proxy: Proxy, in_tmp: Path) -> None:
    """Calls of the dead driver are still carried out while the resumed one works."""
    if state == "slow":
        proxy.delay_s = 1.0
    else:
        fails(proxy, "drops", only="runs/log-batch")()
    killed(proxy, 5, 0.7)
    proxy.delay_s = min(proxy.delay_s, 0.3)
    if state == "drops":
        proxy.mend()
    fedray.resume("r")
    proxy.mend()
    sync("r")
    complete(proxy, in_tmp / "r")


@pytest.mark.slow
def test_a_slow_server_gets_everything(proxy: Proxy, in_tmp: Path) -> None:
    proxy.delay_s = 2.0
    fedray.run(config(proxy), out="r")
    proxy.mend()
    complete(proxy, in_tmp / "r")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_at_any_moment(proxy: Proxy, in_tmp: Path) -> None:
    rng = random.Random(0)
    for number in range(15):
        killed(proxy, rng.randrange(ROUNDS), rng.random() * 0.03)
        fedray.resume("r")
        complete(proxy, in_tmp / "r")
        (in_tmp / "r").rename(in_tmp / f"done-{number}")
        from mlflow import MlflowClient

        MlflowClient(proxy.upstream).delete_run(runs(proxy)[0].info.run_id)
        assert runs(proxy) == []


def test_pauses_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(sender, "MOST_PAUSE_S", 0.4)
    times: list[float] = []

    def call() -> None:
        times.append(time.monotonic())
        if len(times) < 8:
            raise ConnectionError("no")

    one = sender.Sender(lambda _: None, lambda: None)
    one.add(call)
    while len(times) < 8:
        time.sleep(0.01)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses[0] < pauses[-1] and all(0.35 < pause < 5.0 for pause in pauses[3:])
    assert one.wait(1, 1) is None
    one.close()
