"""What is read of a run's directory, and where directories of runs are found."""

import json
from math import isnan, nan

import numpy as np
import pandas as pd
import pytest

from fedray.errors import ConfigError, RunError
from fedray.report.reading import find_runs, load_run
from tests.report.rundirs import lines_of, write_run

# ── reading
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_read_from_its_files(tmp_path):
    run = load_run(write_run(tmp_path / "a", accuracies=(0.1, None, 0.8)))
    assert (run.name, run.label, run.seed, run.config["model"]) == ("a", "a", 0, "cnn")
    assert run.rounds["round"].tolist() == [0, 1, 2]
    assert run.rounds["total/bytes/up"].tolist() == [0, 50e6, 100e6]
    np.testing.assert_array_equal(run.rounds["val/accuracy"], [0.1, nan, 0.8])
    assert run.finished
    assert run.last("test/accuracy") == 0.75
    assert run.client_accuracy is not None and len(run.client_accuracy) == 8
    assert run.clients is None


def test_null_is_nan_and_does_not_count_as_measured(tmp_path):
    path = write_run(tmp_path / "a", status=None)
    lines = lines_of((0.1, 0.5, 0.8), 1)
    lines[2]["metrics"]["val/accuracy"] = None
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(path)
    assert run.rounds["val/accuracy"].dtype == float
    assert isnan(run.rounds["val/accuracy"][2])
    assert run.last("val/accuracy") == 0.5
    assert isnan(run.last("test/accuracy"))


@pytest.mark.parametrize("torn", ['{"round": 3, "metr', '{"round": 3}', "\x00\x00", "3"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = write_run(tmp_path / "a", status=None)
    with open(path / "rounds.jsonl", "a") as file:
        file.write(torn)
    run = load_run(path)
    assert run.last_round == 2
    assert not run.finished


def test_a_torn_line_elsewhere_is_an_error_with_its_number(tmp_path):
    path = write_run(tmp_path / "a")
    good = (path / "rounds.jsonl").read_text()
    (path / "rounds.jsonl").write_text('{"round": 0, "met\n' + good)
    with pytest.raises(RunError, match=r"rounds\.jsonl, line 1: not a JSON mapping"):
        load_run(path)


@pytest.mark.parametrize("name", ["result.json", "client_accuracy.parquet"])
def test_damaged_files_are_named(tmp_path, name):
    path = write_run(tmp_path / "a")
    (path / name).write_bytes(b"{ half of")
    with pytest.raises(RunError, match=name):
        load_run(path)


def test_records_of_clients_are_read_from_all_parts(tmp_path):
    path = write_run(tmp_path / "a")
    folder = path / "clients.parquet"
    folder.mkdir()
    for part, rounds in enumerate(([1, 1], [2])):
        pd.DataFrame({"round": rounds, "client": 7}).to_parquet(folder / f"part-{part}.parquet")
    (folder / ".part-2.parquet.writing").write_bytes(b"half")
    clients = load_run(path).clients
    assert clients is not None
    assert sorted(clients["round"]) == [1, 1, 2]


def test_a_run_that_has_only_begun_can_be_read(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "config.yaml").write_text("seed: 3\n")
    run = load_run(path)
    assert (run.last_round, run.finished, run.seed) == (None, False, 3)
    assert isnan(run.last("val/accuracy"))


# ── finding
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_are_found_below_sweeps_in_natural_order(tmp_path):
    sweep = tmp_path / "sweep"
    for name in ("t-10", "t-2", "t-1"):
        write_run(sweep / "trials" / name)
    (sweep / "sweep.yaml").write_text("base: {}\n")
    # neither a tracker's copies nor what lies inside a run are further runs
    write_run(sweep / "mlruns" / "0" / "copy")
    write_run(sweep / ".tune" / "copy")
    write_run(sweep / "trials" / "t-1" / "checkpoints" / "copy")
    names = [path.name for path in find_runs([sweep])]
    assert names == ["t-1", "t-2", "t-10"]
    assert find_runs([tmp_path]) == find_runs([sweep])


def test_what_a_population_keeps_of_parents_is_no_run(tmp_path):
    write_run(tmp_path / "s" / "trials" / "0-a")
    write_run(tmp_path / "s" / "forks" / "000004" / "0-a")
    (tmp_path / "s" / "sweep.yaml").write_text("name: s\n")
    for place in (tmp_path, tmp_path / "s"):
        assert find_runs([place]) == [tmp_path / "s" / "trials" / "0-a"]


def test_a_run_given_twice_is_found_once(tmp_path):
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert find_runs([two, tmp_path, one]) == [two, one]


def test_rounds_without_a_config_are_a_run(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "config.yaml").unlink()
    assert find_runs([tmp_path]) == [path]


def test_where_nothing_is_found_it_says_what_it_looked_at(tmp_path):
    write_run(tmp_path / "good")
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"missing does not exist; .*empty holds inside; .*file is a file"):
        find_runs([tmp_path / "missing", tmp_path / "good", tmp_path / "empty", tmp_path / "file"])
    with pytest.raises(ConfigError, match="no directory was given"):
        find_runs([])
