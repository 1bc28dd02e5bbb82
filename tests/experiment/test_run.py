"""From a config to a run: what it leaves, when the test set is read, and going on as if never stopped."""

import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fedray
from fedray.config.run_config import RunConfig
from fedray.data import DATASETS, Dataset
from fedray.durable import read_mapping
from fedray.errors import ClientError, ConfigError, DataError, RunError
from fedray.experiment.history import History
from fedray.experiment.run import Federation, resume, run
from fedray.federation.method import Method
from fedray.federation.worker import Workplace
from fedray.methods import METHODS
from fedray.storage.directory import check_free, numbered
from fedray.storage.run_files import RunFiles
from fedray.types import FINAL_METRICS, METRICS, RoundReport
from tests.experiment import tiny

STAGED = {"name": "staged", "density": 0.3, "stages": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A run that nothing happened to."""
    return run(tiny.config(method=STAGED), out=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything starts Ray."""

    def start_ray(meanwhile: object = None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("fedray.experiment.placement.start_ray", start_ray)


# ── what a run leaves
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_history_is_a_table_of_rounds(finished):
    table = finished.to_pandas()
    assert table.index.name == "round"
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table["clients/selected"][0] == 0
    assert table["clients/selected"][1:].between(1, 3).all()  # of the cohort, those that are available
    assert table["total/bytes/up"].tolist() == table["bytes/up"].cumsum().tolist()
    assert table["density/global"].iloc[-1] == pytest.approx(0.3, abs=1e-3)
    assert table["val/accuracy"].notna().all()
    assert np.isnan(table["train/loss"][0])
    assert table["train/loss"][3] < table["train/loss"][1]
    assert len(finished.rounds) == 4
    assert fedray.History is History


def test_the_files_of_a_run(finished):
    assert tiny.listing(finished.path) == [
        ".lock",
        "checkpoints",
        "checkpoints/round-000003.checkpoint",
        "checkpoints/round-000004.checkpoint",
        "client_accuracy.parquet",
        "clients.parquet",
        "clients.parquet/part-000001-000002.parquet",
        "clients.parquet/part-000003-000003.parquet",
        "config.yaml",
        "data.json",
        "made_by.json",
        "model.safetensors",
        "result.json",
        "rounds.jsonl",
    ]
    files = RunFiles.open(finished.path)
    assert RunConfig.from_tree(files.read_config()) == tiny.config(method=STAGED)
    assert tuple({"round": line["round"], **line["metrics"]} for line in files.rounds()) == finished.rounds


def test_the_result_has_every_final_metric(finished):
    result = finished.result
    assert result == read_mapping(finished.path / "result.json")
    assert set(METRICS) <= set(result)
    last = {key: value for key, value in finished.rounds[-1].items() if key != "round"}
    assert {key: result[key] for key in last} == last
    assert {
        f"total/{cost}" for cost in ("bytes/up", "bytes/down", "flops/clients", "time/simulated_s")
    } <= set(result)
    assert (result["rounds"], result["status"]) == (3, "finished")
    assert result["config_digest"] == tiny.config(method=STAGED).digest
    assert 0.1 < result["test/accuracy"] <= 1


def test_the_sha_is_that_of_the_model_on_disk(finished):
    assert finished.weights_sha256 == tiny.model_sha256(finished.path / "model.safetensors")
    assert finished.weights_sha256 == finished.result["weights_sha256"]


def test_the_final_model_was_tried_on_clients_own_examples(finished):
    table = pd.read_parquet(finished.path / "client_accuracy.parquet")
    assert table["client"].tolist() == list(range(6))
    assert table["num_examples"].sum() == 1437 - 144
    assert table["accuracy"].between(0, 1).all()
    assert finished.result["clients/accuracy_mean"] == pytest.approx(table["accuracy"].mean())
    assert finished.result["clients/accuracy_std"] == pytest.approx(table["accuracy"].std(ddof=0))
    assert finished.result["clients/accuracy_worst_decile"] == pytest.approx(table["accuracy"].min())


def test_of_many_clients_the_final_model_is_tried_on_some():
    federation = Federation.of(tiny.config({"clients.population": 300}))
    drawn = federation.sampled_clients()
    assert len(set(drawn)) == 200
    assert drawn == sorted(drawn) == Federation.of(tiny.config({"clients.population": 300})).sampled_clients()
    assert drawn != Federation.of(tiny.config({"clients.population": 300}, seed=1)).sampled_clients()


def test_the_number_of_these_clients_is_an_option(tmp_path):
    some = run(tiny.config(eval_clients=2), out=tmp_path / "two")
    assert len(pd.read_parquet(some.path / "client_accuracy.parquet")) == 2
    none = run(tiny.config(eval_clients=0), out=tmp_path / "none")
    assert not (none.path / "client_accuracy.parquet").exists()
    assert set(some.result) - set(none.result) == set(FINAL_METRICS)
    assert none.result["status"] == "finished"
    assert none.weights_sha256 == some.weights_sha256


def test_the_same_config_makes_the_same_run(finished, tmp_path):
    """With checkpoints at other rounds and somebody who looks on, too."""
    config = tiny.config(method=STAGED, checkpoint_every=1)
    again = run(config, out=tmp_path / "run", on_round=lambda report: None)
    assert again.weights_sha256 == finished.weights_sha256
    mine, theirs = tiny.figures(tmp_path / "run"), tiny.figures(finished.path)
    assert mine == theirs
    assert (
        run(tiny.config(method=STAGED, seed=1), out=tmp_path / "other").weights_sha256 != again.weights_sha256
    )


def test_eval_every(tmp_path):
    """Validation at the set-up, at every other round, and at the last in any case."""
    table = run(tiny.config(eval_every=2), out=tmp_path / "run").to_pandas()
    assert table["val/accuracy"].notna().tolist() == [True, False, True, True]
    assert table["train/loss"].notna().tolist() == [False, True, True, True]


def test_without_validation_data_nothing_is_validated(tmp_path):
    history = run(tiny.config({"data.validation_fraction": 0}, rounds=1), out=tmp_path / "run")
    assert "val/accuracy" not in history.to_pandas()
    assert history.result["test/accuracy"] > 0


def test_on_round_sees_every_round_once_and_in_order(tmp_path):
    seen: list[RoundReport] = []
    history = run(tiny.config(), out=tmp_path / "run", on_round=seen.append)
    assert [report.round for report in seen] == [0, 1, 2, 3]
    assert [{"round": report.round, **report.metrics} for report in seen] == list(history.rounds)
    assert [len(report.clients) for report in seen] == history.to_pandas()["clients/selected"].tolist()


# ── the test set
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The one data set that every run of this test loads."""
    dataset = DATASETS["digits"].load(None)
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], load=lambda root: dataset))
    return dataset


@pytest.mark.parametrize(
    "method", [STAGED, {"name": "frlp", "solver": "bisect", "prune_rounds": [1]}, {"name": "snip"}]
)
def test_the_test_set_is_read_once_after_the_last_round(tmp_path, digits, method):
    log: list[Any] = []
    config = tiny.config({"method": method, "data.server_fraction": 0.1})
    run(config, out=tmp_path / "run", pool=lambda place: tiny.Watched(place, log), on_round=log.append)
    (place,) = (item for item in log if isinstance(item, Workplace))
    assert len(place.dataset.test) == 0  # so no method can
    reads = [position for position, item in enumerate(log) if item is digits.test]
    rounds = [position for position, item in enumerate(log) if isinstance(item, RoundReport)]
    assert len(reads) == 1
    assert len(rounds) == 4
    assert reads[0] > rounds[-1]


def test_a_run_that_ends_early_has_not_read_the_test_set(tmp_path, digits):
    log: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        run(
            tiny.config(),
            out=tmp_path / "run",
            pool=lambda place: tiny.Watched(place, log),
            on_round=tiny.ending(3, KeyboardInterrupt),
        )
    assert not any(item is digits.test for item in log)
    resume(tmp_path / "run", pool=lambda place: tiny.Watched(place, log))
    assert sum(item is digits.test for item in log) == 1


# ── going on
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("round", [0, 1, 2, 3])
def test_a_run_goes_on_as_if_it_had_never_stopped(finished, tmp_path, caplog, round, error):
    out = tmp_path / "run"
    with pytest.raises(error, match=f"after round {round}"):
        run(tiny.config(method=STAGED), out=out, on_round=tiny.ending(round, error))
    how = "failed" if error is ValueError else "interrupted"
    assert f"{how}; `fedray resume {out}` continues from the last checkpoint" in caplog.text
    assert not (out / "result.json").exists()
    seen: list[int] = []
    history = resume(out, on_round=lambda report: seen.append(report.round))
    assert seen == list(range(round + 1, 4))  # every complete round is kept
    assert history.weights_sha256 == finished.weights_sha256
    assert tiny.figures(out) == tiny.figures(finished.path)
    assert history.result == read_mapping(out / "result.json")


def test_a_run_may_be_stopped_any_number_of_times(finished, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="after"):
        run(tiny.config(method=STAGED), out=out, on_round=tiny.ending(0, ValueError))
    for round in (1, 2, 3):
        with pytest.raises(ValueError, match="after"):
            resume(out, on_round=tiny.ending(round, ValueError))
    resume(out)
    assert tiny.figures(out) == tiny.figures(finished.path)


def test_a_finished_run_is_only_read(finished, monkeypatch):
    def load(root: Path | None) -> Any:
        raise AssertionError("the data was loaded")

    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], load=load))
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    again = resume(str(finished.path), on_round=lambda report: pytest.fail("a round was made"))
    assert again == finished
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")} == before


def test_a_run_that_a_scheduler_stopped_goes_on(finished, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(method=STAGED), out=out, on_round=tiny.ending(2, KeyboardInterrupt))
    RunFiles(out).write_json("result.json", {"status": "stopped"})
    assert resume(out).weights_sha256 == finished.weights_sha256


def test_a_run_goes_on_from_another_working_directory(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(method=STAGED), out="run", on_round=tiny.ending(2, KeyboardInterrupt))
    monkeypatch.chdir("/")
    assert resume(tmp_path / "run").weights_sha256 == finished.weights_sha256


def test_an_error_of_a_client_is_recorded(tmp_path, monkeypatch):
    from fedray.federation.method import Method

    def broken(self: Method, task: Any, client: Any) -> Any:
        raise ZeroDivisionError("on the device")

    with monkeypatch.context() as patched:
        patched.setattr(METHODS["fedavg"], "client_update", broken, raising=False)
        with pytest.raises(ClientError, match="on the device"):
            run(tiny.config(), out=tmp_path / "run")
    warnings = (tmp_path / "run" / "warnings.txt").read_text()
    assert warnings.startswith("failed: client ")
    assert "in round 1" in warnings
    assert resume(tmp_path / "run").result["status"] == "finished"  # the code has been mended


# ── directories
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_without_a_directory_gets_the_next_one(in_tmp):
    config = tiny.config(rounds=1)
    paths = [run(config).path, run(config).path, run(config.override(seed=3)).path]
    assert paths == [
        in_tmp / "runs/fedavg-digits-mlp-s0-001",
        in_tmp / "runs/fedavg-digits-mlp-s0-002",
        in_tmp / "runs/fedavg-digits-mlp-s3-001",
    ]
    assert sorted(path.name for path in (in_tmp / "runs").iterdir()) == [path.name for path in paths]


def test_runs_that_start_at_once_get_directories_of_their_own(in_tmp, monkeypatch):
    """All have seen the same number free before the first takes it."""
    starters = 3
    barrier = threading.Barrier(starters)
    waited = threading.local()

    def number(*where: Any) -> Path:
        path = numbered(*where)
        if not getattr(waited, "once", False):
            waited.once = True
            barrier.wait()
        return path

    monkeypatch.setattr("fedray.storage.directory.numbered", number)
    config, histories = tiny.config(rounds=1), list[History]()
    threads = [threading.Thread(target=lambda: histories.append(run(config))) for _ in range(starters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(history.path.name for history in histories) == [
        f"fedavg-digits-mlp-s0-00{number}" for number in (1, 2, 3)
    ]
    assert len({history.weights_sha256 for history in histories}) == 1


def test_a_directory_that_holds_something_is_refused(in_tmp, finished, no_ray):
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"^mine is not empty: .* choose another one with --out$"):
        run(tiny.config(), out="mine")
    assert tiny.listing(in_tmp) == ["mine", "mine/thesis.tex"]
    before = tiny.figures(finished.path)
    with pytest.raises(ConfigError, match="is not empty"):
        run(tiny.config(), out=finished.path)
    assert tiny.figures(finished.path) == before


def test_of_two_runs_for_one_directory_the_second_is_refused(in_tmp, monkeypatch):
    """Even if the first takes it while the second loads its data."""
    real = check_free

    def check(path: Path) -> None:
        real(path)
        RunFiles.create(path)
        monkeypatch.setattr("fedray.experiment.homes.check_free", real)

    monkeypatch.setattr("fedray.experiment.homes.check_free", check)
    with pytest.raises(ConfigError, match=r"is not empty|is another run's directory"):
        run(tiny.config(), out="run")
    assert tiny.listing(in_tmp) == ["run", "run/checkpoints"]


def test_runs_cannot_be_made_where_there_is_no_folder(in_tmp):
    (in_tmp / "runs").write_text("not a folder")
    with pytest.raises(ConfigError, match="cannot be made: Not a directory"):
        run(tiny.config())


# ── bad input
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({"kind": "shards", "classes_per_client": 11}, r"data\.partition\.classes_per_client=11 "),
        ({"kind": "natural"}, r"data\.partition\.kind=natural: this data set does not name the writers"),
    ],
)
def test_data_that_cannot_be_dealt_leaves_nothing_behind(in_tmp, monkeypatch, no_ray, partition, message):
    """Only the data itself shows this; the config alone is valid."""
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], has_writers=True))
    changes = {"data.partition": partition, "clients.actors": 2, "tracking.uri": "sqlite:///mlflow.db"}
    for out in (None, "run"):
        with pytest.raises(DataError, match=message):
            run(tiny.config(changes), out=out)
    assert tiny.listing(in_tmp) == []


def test_data_that_is_not_there_leaves_nothing_behind(in_tmp, no_ray):
    (in_tmp / "data").mkdir()
    (in_tmp / "data" / "MNIST" / "raw").mkdir(parents=True)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (in_tmp / "data" / "MNIST" / "raw" / f"{stem}-ubyte").write_bytes(b"torn")
    before = tiny.listing(in_tmp)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: cannot be read"):
        run(tiny.config({"data.name": "mnist", "data.root": "data", "clients.actors": 2}))
    assert tiny.listing(in_tmp) == before


@pytest.mark.parametrize(
    "override", ["rounds=0", "method.name=fedprox9", "data.partition.kind=natural", "model=vgg11"]
)
def test_a_config_that_cannot_run_leaves_nothing_behind(in_tmp, no_ray, override):
    path = in_tmp / "x.yaml"
    path.write_text("rounds: 3\n")
    with pytest.raises(ConfigError):
        run(RunConfig.load(path, [override]))
    assert tiny.listing(in_tmp) == ["x.yaml"]


# ── warnings
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_odd_about_the_data_is_recorded(tmp_path, digits, monkeypatch):
    odd = replace(digits, warnings=("these are not the published files",))
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], load=lambda root: odd))
    run(tiny.config(rounds=1), out=tmp_path / "run")
    assert (tmp_path / "run" / "warnings.txt").read_text() == "these are not the published files\n"


def test_updates_that_were_left_out_are_recorded(tmp_path):
    changes = {"method.lr": 1e18, "clients.max_failed": 1}
    history = run(tiny.config(changes, rounds=1), out=tmp_path / "run")
    warnings = (tmp_path / "run" / "warnings.txt").read_text()
    assert warnings.startswith("round 1: 3 update(s) left out as non-finite: clients [")
    assert history.rounds[1]["clients/dropped"] == 3
    assert history.result["test/accuracy"] >= 0  # nobody counted, and the model is the old one


def test_nothing_to_warn_of_leaves_no_file(finished):
    assert not (finished.path / "warnings.txt").exists()
    assert not (finished.path / "client_errors.txt").exists()


def test_a_run_whose_training_diverges_fails_and_says_so(tmp_path):
    with pytest.raises(RunError, match=r"3 of 3 clients .* non-finite: .* lower method\.lr"):
        run(tiny.config({"method.lr": 1e18}), out=tmp_path / "run")
    assert "failed: round 1: 3 of 3 clients" in (tmp_path / "run" / "warnings.txt").read_text()
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = resume(tmp_path / "run", {"clients.max_failed": 1})
    asked = sum(line["clients/selected"] for line in resumed.rounds)
    assert resumed.result["total/clients/failed"] == asked > 3


def test_clients_that_raise_are_counted_over_a_resume_and_their_tracebacks_are_kept(tmp_path, monkeypatch):
    sound = Method.client_update

    def failing(self: Method, task: Any, client: Any) -> Any:
        if client.id % 3 == client.round % 3:
            raise ZeroDivisionError("on the device")
        return sound(self, task, client)

    monkeypatch.setattr(METHODS["fedavg"], "client_update", failing, raising=False)
    config = tiny.config({"clients.max_failed": 0.5, "clients.population": 12, "clients.cohort": 12})
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "run", on_round=tiny.ending(2, KeyboardInterrupt))
    again = resume(tmp_path / "run")
    assert again.weights_sha256 == whole.weights_sha256
    assert again.result["total/clients/failed"] == whole.result["total/clients/failed"] > 0
    rows = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    assert (rows.fate == "failed").sum() == again.result["total/clients/failed"]
    errors = (tmp_path / "run" / "client_errors.txt").read_text()
    for row in rows[rows.fate == "failed"].itertuples():
        assert f"round {row.round}, client {row.client}:\nTraceback" in errors
    assert "ZeroDivisionError: on the device" in errors
    assert "client(s) failed and were left out" in (tmp_path / "run" / "warnings.txt").read_text()


# ── methods from outside
# ──────────────────────────────────────────────────────────────────────────────────────────

MINE = '''
from dataclasses import dataclass, replace
from fedray.methods import METHODS
from fedray.federation.method import Method


@dataclass(frozen=True)
class Counter:
    """What is remembered."""
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    """FedAvg that counts."""
    step: int = 2

    def setup(self, state, ctx):
        return replace(state, memory=Counter(0))

    def prune(self, state, cohort, ctx):
        return replace(state, memory=Counter(state.memory.rounds + self.step))


METHODS["mine"] = Mine
'''


@pytest.fixture
def mine(in_tmp: Path) -> str:
    """Write a file with a user's method."""
    (in_tmp / "mine.py").write_text(MINE)
    return "mine.py"


def test_a_method_of_ones_own(mine, in_tmp, monkeypatch):
    with pytest.raises(ConfigError, match="unknown method 'mine'"):
        tiny.config({"method.name": "mine"})
    config = tiny.config({"imports": [mine], "method.name": "mine", "method.step": 3})
    with pytest.raises(ConfigError, match="mine has no such option; did you mean 'step'"):
        config.override({"method.stp": 3})
    with pytest.raises(KeyboardInterrupt):
        run(config, out="run", on_round=tiny.ending(2, KeyboardInterrupt))
    found = RunFiles(in_tmp / "run").load()
    assert found is not None
    assert found.checkpoint.state.memory.rounds == 6
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # the file is still found
    history = resume("../run")
    assert history.result["status"] == "finished"
    assert history.weights_sha256 == run(tiny.config(), out="fedavg").weights_sha256
    assert RunFiles(in_tmp / "run").read_config()["imports"] == [str(in_tmp / "mine.py")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.py", "import nowhere_to_be_found", "mine.py raised ModuleNotFoundError: No module named"),
        ("mine.py", "def f(:", "mine.py raised SyntaxError: "),
        ("mine.txt", "x = 1", "mine.txt is not a Python file"),
    ],
)
def test_a_file_that_cannot_be_imported(in_tmp, name, text, message):
    (in_tmp / name).write_text(text)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=f"^imports: {message}"):
        tiny.config(imports=[name])
    assert not {module for module in set(sys.modules) - before if "mine" in module}


def test_the_data_of_several_configs_is_loaded_once_and_dealt_for_each(monkeypatch):
    """What cannot be dealt for a later seed, model or population is found like what cannot for the first."""
    from dataclasses import replace

    from fedray.data import DATASETS
    from fedray.data.partition import Iid
    from fedray.errors import DataError
    from fedray.experiment.dealing import check_data

    spec, loaded, dealt = DATASETS["digits"], [], []

    def load(root):
        loaded.append(root)
        return spec.load(root)

    def deal(self, labels, writers, rows, population, seed):
        dealt.append(population)
        if population == 9:
            raise DataError("nine is too many")
        return whole(self, labels, writers, rows, population, seed)

    whole = Iid.split
    monkeypatch.setitem(DATASETS, "digits", replace(spec, load=load))
    monkeypatch.setattr(Iid, "split", deal)
    several = [tiny.config({"seed": seed, "method.lr": lr}) for seed in (0, 1) for lr in (0.1, 0.2)]
    check_data(several)
    assert (len(loaded), dealt) == (1, [6, 6])
    with pytest.raises(DataError, match="nine is too many"):
        check_data([*several, tiny.config({"clients.population": 9})])
