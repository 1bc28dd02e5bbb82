"""A signal at any moment: complete rounds are kept, tracking ends as KILLED, resumed weights are the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fedray
from fedray.config import yaml_text
from fedray.config.run_config import RunConfig
from fedray.experiment.interrupt import signals
from fedray.experiment.run import Federation
from fedray.federation.method import Method
from fedray.federation.pool import LocalPool
from fedray.methods import METHODS
from fedray.storage.run_files import RunFiles
from fedray.tracking.store import prepare_store
from fedray.types import ClientUpdate, Params, RoundReport, Task
from tests.experiment import tiny

ROUNDS = 5
HOOKS = ("setup", "configure", "client_update", "aggregate", "prune")


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@dataclass(frozen=True, kw_only=True)
class Hit(Method):
    """FedAvg with momentum in the clients' memory; a signal comes in one hook, once, when `at` is there."""

    citation: ClassVar[str] = "made up"
    hook: str = ""
    round: int = 0
    at: str = ""

    def _hit(self, hook: str, round: int) -> None:
        if hook == self.hook and round == self.round and self.at and Path(self.at).exists():
            Path(self.at).unlink()
            send()

    def setup(self, state, ctx):
        self._hit("setup", 0)
        return super().setup(state, ctx)

    def configure(self, state, client):
        self._hit("configure", state.round)
        return Task(state.params, state.mask, extras={"round": state.round})

    def client_update(self, task, client):
        moved = client.sgd(task.params, task.mask).flat - task.params.flat
        client.memory["velocity"] = velocity = 0.5 * client.memory.get("velocity", 0.0) + moved
        self._hit("client_update", int(task.extras["round"]))
        params = Params(task.params.flat + velocity, task.params.layout)
        return ClientUpdate(params, task.mask, sums={"seen": torch.ones(1)})

    def aggregate(self, state, cohort):
        self._hit("aggregate", state.round)
        return super().aggregate(state, cohort)

    def prune(self, state, cohort, ctx):
        self._hit("prune", state.round)
        return super().prune(state, cohort, ctx)


@pytest.fixture(autouse=True)
def _method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "hit", Hit)


def config(**method: Any) -> RunConfig:
    changes = {f"method.{name}": value for name, value in method.items()}
    return tiny.config(
        {"method": {"name": "hit", "batch_size": 50}, "rounds": ROUNDS, "checkpoint_every": 10} | changes
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "hit", Hit)
        path = tmp_path_factory.mktemp("whole") / "r"
        fedray.run(config(), out=path)
    return tiny.figures(path)


def same(path: Path, undisturbed: dict[str, Any]) -> bool:
    """Whether a run ended as the undisturbed one; their configs differ in where the signal came."""
    ours, theirs = tiny.figures(path), dict(undisturbed)
    for figures in (ours, theirs):
        figures["result"] = {k: v for k, v in figures["result"].items() if k != "config_digest"}
    return ours == theirs


def done(path: Path) -> int:
    """Return the round of the newest checkpoint, which must be that of the last line; -1 if there is none."""
    files = RunFiles.open(path)
    found = files.load()
    rounds = files.rounds()
    assert (found.done if found else -1) == (rounds[-1]["round"] if rounds else -1)
    return found.done if found else -1


@pytest.mark.parametrize("hook", HOOKS)
def test_a_signal_in_a_round_drops_it_and_keeps_the_ones_before(
    hook: str, in_tmp: Path, undisturbed: dict[str, Any]
) -> None:
    round = 0 if hook == "setup" else 4
    (in_tmp / "at").touch()
    with pytest.raises(SystemExit) as ended:
        fedray.run(config(hook=hook, round=round, at=str(in_tmp / "at")), out="r")
    assert ended.value.code == 128 + signal.SIGTERM
    assert done(in_tmp / "r") == round - 1
    fedray.resume("r")
    assert same(in_tmp / "r", undisturbed)


def once(action: Callable[[], None]) -> Callable[[], None]:
    calls = iter([action])
    return lambda: next(calls, lambda: None)()


def test_a_signal_before_the_first_round(in_tmp: Path, undisturbed: dict[str, Any]) -> None:
    def pool(place: Any) -> LocalPool:
        send()
        return LocalPool(place)

    with pytest.raises(SystemExit):
        fedray.run(config(), out="r", pool=pool)
    assert done(in_tmp / "r") == -1
    fedray.resume("r")
    assert same(in_tmp / "r", undisturbed)


@pytest.mark.parametrize(
    ("name", "file", "rounds"),
    [
        ("write_json", "imports.json", -1),  # before config.yaml
        ("write_json", "data.json", -1),
        ("append", None, 0),
        ("save", None, 0),
        ("write_model", None, ROUNDS),
        ("write_json", "result.json", ROUNDS),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_signal_while_files_are_written(
    name: str,
    file: str | None,
    rounds: int,
    first: bool,
    in_tmp: Path,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, hit = getattr(RunFiles, name), once(send)

    def written(self: RunFiles, *arguments: Any) -> Any:
        if file is not None and arguments[0] != file:
            return write(self, *arguments)
        if first:
            hit()
        result = write(self, *arguments)
        hit()
        return result

    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(RunFiles, name, written)
        fedray.run(config(), out="r")
    assert done(in_tmp / "r") == rounds
    fedray.resume("r")
    assert same(in_tmp / "r", undisturbed)


def test_a_signal_in_the_final_evaluation(
    in_tmp: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, hit = Federation.sampled_clients, once(send)

    def sampling(self: Federation) -> list[int]:
        hit()
        return sampled(self)

    monkeypatch.setattr(Federation, "sampled_clients", sampling)
    with pytest.raises(SystemExit):
        fedray.run(config(), out="r")
    assert done(in_tmp / "r") == ROUNDS and not (in_tmp / "r" / "result.json").exists()
    fedray.resume("r")
    assert same(in_tmp / "r", undisturbed)


def signalled(round: int, number: int) -> Callable[[RoundReport], None]:
    def on_round(report: RoundReport) -> None:
        if report.round == round:
            send(number)

    return on_round


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_each_signal_says_how_to_resume_and_is_given_back(
    number: int, error: type[BaseException], in_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(error) as ended:
        fedray.run(config(), out="r", on_round=signalled(2, number))
    assert getattr(ended.value, "code", 128 + number) == 128 + number
    assert done(in_tmp / "r") == 2
    assert "interrupted; `fedray resume" in caplog.messages[-1]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_run_that_breaks_keeps_its_complete_rounds_too(in_tmp: Path, undisturbed: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        fedray.run(config(), out="r", on_round=tiny.ending(3, RuntimeError))
    assert done(in_tmp / "r") == 3
    fedray.resume("r")
    assert same(in_tmp / "r", undisturbed)


# ── whose handlers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def handler() -> Iterator[Callable[[Any], None]]:
    """Set the handler of SIGTERM, and give it back at the end."""
    before = signal.getsignal(signal.SIGTERM)

    def set_it(wanted: Any) -> None:
        signal.signal(signal.SIGTERM, wanted)

    yield set_it
    signal.signal(signal.SIGTERM, before)


def test_a_users_own_handler_and_an_ignored_signal_stay(handler: Callable[[Any], None], in_tmp: Path) -> None:
    got: list[int] = []
    handler(lambda number, frame: got.append(number))
    assert fedray.run(config(), out="a", on_round=signalled(2, signal.SIGTERM)).result["rounds"] == ROUNDS
    assert got == [signal.SIGTERM]
    handler(signal.SIG_IGN)
    assert fedray.run(config(), out="b", on_round=signalled(2, signal.SIGTERM)).result["rounds"] == ROUNDS


def test_rays_handler_is_replaced(handler: Callable[[Any], None]) -> None:
    def by_ray(number: int, frame: Any) -> None: ...

    by_ray.__module__ = "ray._private.worker"
    handler(by_ray)
    with signals():
        assert signal.getsignal(signal.SIGTERM) is not by_ray
    assert signal.getsignal(signal.SIGTERM) is by_ray


def test_in_another_thread_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def inside() -> None:
        with signals() as stop:
            stop.check()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_inner_signals_are_the_outer_ones() -> None:
    with signals() as outer:
        with signals() as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) == outer.receive


def test_whatever_breaks_after_a_signal_is_the_signal() -> None:
    with pytest.raises(SystemExit) as ended, signals():
        send()
        raise RuntimeError("an actor died")
    assert ended.value.code == 143


# ── whole processes ──────────────────────────────────────────────────────────────────────────────────────


def started(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    (folder / "x.yaml").write_text(yaml_text.dump({"base": tiny.TREE}))
    command = [sys.executable, "-m", "fedray.cli", "run", "x.yaml", "rounds=100000", "--out", "r", *overrides]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def rounds_of(folder: Path) -> int:
    log = folder / "r" / "rounds.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_command_ends_with_128_plus_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = started(tmp_path, "checkpoint_every=1000", f"tracking.uri={uri}")
    wait_for(lambda: rounds_of(tmp_path) > 20, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: ending" in said and "fedray resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert done(tmp_path / "r") >= 20
    assert prepare_store(uri, "fedray").problem is None  # imports MLflow without its warnings
    from mlflow import MlflowClient

    (run,) = MlflowClient(uri).search_runs(["1"])
    assert run.info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])  # a scheduler may send it to Ray's processes too
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_clients_on_ray_too(number: signal.Signals, to_all: bool, tmp_path: Path) -> None:
    process = started(tmp_path, "checkpoint_every=1000", "clients.actors=1")
    try:
        wait_for(lambda: rounds_of(tmp_path) > 20, process)
        if to_all:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number
    assert "fedray resume" in said.splitlines()[-1] and "Traceback" not in said
    assert done(tmp_path / "r") >= 20


@pytest.mark.slow
def test_the_second_signal_ends_the_command_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom fedray.storage.run_files import RunFiles\n"
        "save = RunFiles.save\n"
        "def slowly(self, *a):\n    save(self, *a)\n    (self.path / 'saving').touch()\n    time.sleep(300)\n"
        "RunFiles.save = slowly\n"
    )
    process = started(tmp_path, "--import", "slow.py")
    wait_for(lambda: (tmp_path / "r" / "saving").exists(), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None  # it waits for the file
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM and time.monotonic() - before < 5
