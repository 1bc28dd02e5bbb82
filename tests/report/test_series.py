"""How runs are told apart."""

import pytest

from fedray.report.reading import find_runs, load_run
from fedray.report.series import label_runs, settings
from tests.report.rundirs import staged, write_run


def labels_of(tmp_path, *changes):
    paths = [write_run(tmp_path / f"t{number}", change) for number, change in enumerate(changes)]
    return [run.label for run in label_runs([load_run(path) for path in paths])]


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}], ["fedavg"]),
        ([{"seed": 0}, {"seed": 1}], ["s0", "s1"]),
        # options of one method do not tell it from another
        ([{}, staged()], ["fedavg", "staged"]),
        (
            [{}, staged(threshold=0.5), staged(threshold=1.0)],
            ["fedavg", "staged threshold=0.5", "staged threshold=1"],
        ),
        # an option that all have does
        ([{}, staged(lr=0.3)], ["fedavg lr=0.1", "staged lr=0.3"]),
        ([{"seed": 1}, staged() | {"seed": 2, "model": "mlp"}], ["fedavg cnn s1", "staged mlp s2"]),
        (
            [{"data.partition": {"kind": "iid"}}, {}, {"data.partition.alpha": 0.1}],
            ["iid", "dirichlet alpha=0.5", "dirichlet alpha=0.1"],
        ),
        ([{}, {"clients.devices": {"phone": 1.0}}], ["devices=phone:0.6+laptop:0.4", "devices=phone:1"]),
        # the same last part twice is written out
        (
            [{"data.name": "a", "clients.name": 1}, {"data.name": "b", "clients.name": 2}],
            ["a clients.name=1", "b clients.name=2"],
        ),
        # where a run is computed and kept does not matter
        ([{}, {"tracking.uri": "x", "clients.actors": 2, "data.root": "y"}], ["fedavg (t0)", "fedavg (t1)"]),
        (
            [{"clients.resources": {"gpu": gpu, "by_device": {}}} for gpu in (0, 1)],
            ["fedavg (t0)", "fedavg (t1)"],
        ),
        # but which clients are folded together does
        (
            [
                {"clients.resources": {"by_device": by}}
                for by in ({"phone": {"cpu": 1}}, {"phone": {"cpu": 2}})
            ],
            ["cpu=1", "cpu=2"],
        ),
        ([staged(stages=[1, 2]), staged(stages=None)], ["stages=1,2", "stages=none"]),
    ],
)
def test_labels_name_what_differs(tmp_path, changes, labels):
    assert labels_of(tmp_path, *changes) == labels


def test_equal_runs_of_equal_name_are_labelled_by_path(tmp_path):
    paths = [write_run(tmp_path / side / "run") for side in ("left", "right")]
    assert [run.label for run in label_runs([load_run(p) for p in paths])] == [f"fedavg ({p})" for p in paths]


def test_a_run_without_a_config_does_not_lengthen_the_labels_of_others(tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2), ("broken", 0.3)):
        write_run(tmp_path / name, {"method.lr": rate})
    (tmp_path / "broken" / "config.yaml").unlink()
    runs = [load_run(path) for path in find_runs([tmp_path])]
    assert [run.label for run in label_runs(runs)] == ["lr=0.1", "lr=0.2", "broken"]


def test_a_run_without_a_config_is_labelled_by_its_name_and_that_is_said(tmp_path, caplog):
    path = write_run(tmp_path / "a")
    (path / "config.yaml").unlink()
    assert label_runs([load_run(path)])[0].label == "a"
    assert "a/config.yaml: is missing: the run is shown under the name of its directory" in caplog.text


BANDIT = {"policy": "bandit", "steepest": 0.0, "budget": None, "preference": 0.1}


@pytest.mark.parametrize(
    ("others", "labels"),
    [
        ({"steepest": 0.5}, ["staged steepest=0", "staged steepest=0.5"]),
        ({"budget": 0.3}, ["staged budget=none", "staged budget=0.3"]),
        ({"preference": 0.1000000001}, ["staged preference=0.1", "staged preference=0.1000000001"]),
        # a run of a version that had no such option
        ({"steepest": None}, ["staged steepest=0", "staged steepest=none"]),
        ({"steepest": ...}, ["staged steepest=0", "staged"]),
        # nothing that a text can show
        ({"budget": "none"}, ["staged budget=none (t1)", "staged budget=none (t2)"]),
    ],
)
def test_two_bandits_never_share_a_name(tmp_path, others, labels):
    second = {key: value for key, value in (BANDIT | others).items() if value is not ...}
    changes = [{}, staged(**BANDIT), staged(**second)]
    paths = [write_run(tmp_path / f"t{number}", change) for number, change in enumerate(changes)]
    runs = [load_run(path) for path in paths]
    assert [setting.label for setting in settings(runs)] == ["fedavg", *labels]
    assert [run.label for run in label_runs(runs)] == ["fedavg", *labels]


def test_seeds_and_stopped_runs_share_the_name_of_their_setting(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", staged(**BANDIT) | {"seed": seed})
        write_run(tmp_path / f"b{seed}", {"seed": seed})
    write_run(tmp_path / "stopped", {"seed": 2}, accuracies=(0.1, 0.5), status=None)
    found = settings([load_run(path) for path in sorted(tmp_path.iterdir())])
    assert [setting.label for setting in found] == ["staged", "fedavg", "fedavg"]
    assert len({setting.status for setting in found[1:]}) == 2
