"""What is read, how runs are told apart and compared, what is written; numbers are worked out by hand."""

import json
import subprocess
import sys
from itertools import pairwise
from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from fedray.errors import ConfigError, RunError
from fedray.experiment import figures, yaml
from fedray.experiment.report import (
    accuracy_at,
    comparison,
    find_runs,
    label_runs,
    load_run,
    mean_and_interval,
    render_table,
    settings,
    to_markdown,
    write_report,
)

CONFIG = {
    "rounds": 2,
    "seed": 0,
    "model": "cnn",
    "data": {"name": "digits", "root": None, "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "clients": {"population": 10, "cohort": 2, "devices": {"phone": 0.6, "laptop": 0.4}, "actors": "auto"},
    "method": {"name": "fedavg", "lr": 0.1},
    "tracking": {"uri": "none"},
}


def config_of(changes):
    tree = json.loads(json.dumps(CONFIG))
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        section[last] = value
    return tree


def lines_of(accuracies, up, density=1.0):
    """A line per round: 0 costs nothing, each later one `up` bytes, twice that down, 1e12 FLOPs, 10 s."""
    lines = []
    for round, accuracy in enumerate(accuracies):
        metrics = {
            "density/global": density,
            "total/bytes/up": float(up * round),
            "total/bytes/down": float(2 * up * round),
            "total/flops/clients": 1e12 * round,
            "total/time/simulated_s": 10.0 * round,
        }
        if accuracy is not None:
            metrics["val/accuracy"] = accuracy
        lines.append({"round": round, "metrics": metrics, "notes": []})
    return lines


def write_run(
    path,
    changes=(),
    accuracies=(0.1, 0.5, 0.8),
    up=50e6,
    density=1.0,
    test=0.75,
    status="finished",
    clients=8,
):
    """Make a run's directory as `fedray.experiment.files` would; `status=None` is a run that goes on."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.dump(config_of(dict(changes))), encoding="utf-8")
    lines = lines_of(accuracies, up, density)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "rounds.jsonl").write_text(text, encoding="utf-8")
    if status is not None:
        result = {**lines[-1]["metrics"], "rounds": len(lines) - 1, "status": status}
        if status == "finished":
            result["test/accuracy"] = test
            accuracy = np.linspace(0.5, 1.0, clients)
            pd.DataFrame({"client": range(clients), "accuracy": accuracy}).to_parquet(
                path / "client_accuracy.parquet"
            )
        (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return path


def staged(**more):
    return {"method": {"name": "staged", "lr": 0.1, "threshold": 0.5, "stages": 4} | more}


def rows_of(*paths, target=None):
    return comparison([load_run(path) for path in paths], target).set_index("setting")


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


@pytest.mark.parametrize("torn", ['{"round": 3, "metr', '{"round": 3}', "\x00\x00", "3\n"])
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
    with pytest.raises(RunError, match=r"rounds\.jsonl, line 1: not a round"):
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
    (row,) = comparison([run]).to_dict("records")
    assert row["status"] == "no round yet"
    assert isnan(row["rounds"])


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


def test_a_run_given_twice_is_found_once(tmp_path):
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert find_runs([two, tmp_path, one]) == [two, one]


def test_rounds_without_a_config_are_a_run(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "config.yaml").unlink()
    assert find_runs([tmp_path]) == [path]
    assert label_runs([load_run(path)])[0].label == "a"


def test_where_nothing_is_found_it_says_what_it_looked_at(tmp_path):
    write_run(tmp_path / "good")
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"missing does not exist; .*empty holds inside; .*file is a file"):
        find_runs([tmp_path / "missing", tmp_path / "good", tmp_path / "empty", tmp_path / "file"])
    with pytest.raises(ConfigError, match="no directory was given"):
        find_runs([])


# ── labels
# ──────────────────────────────────────────────────────────────────────────────────────────────────


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
        ([staged(stages=[1, 2]), staged(stages=None)], ["stages=1,2", "stages=none"]),
    ],
)
def test_labels_name_what_differs(tmp_path, changes, labels):
    assert labels_of(tmp_path, *changes) == labels


def test_equal_runs_of_equal_name_are_labelled_by_path(tmp_path):
    paths = [write_run(tmp_path / side / "run") for side in ("left", "right")]
    assert [run.label for run in label_runs([load_run(p) for p in paths])] == [f"fedavg ({p})" for p in paths]


# ── comparing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_intervals_by_hand():
    # sd of .80 .82 .84 is .02, and Student's t for 2 degrees of freedom is 4.30265
    assert mean_and_interval([0.80, 0.82, 0.84]) == pytest.approx((0.82, 4.30265 * 0.02 / 3**0.5), rel=1e-5)
    # sd / √2 of .8 .9 is .05, and t for 1 degree is 12.7062
    assert mean_and_interval([0.8, 0.9]) == pytest.approx((0.85, 12.7062 * 0.05), rel=1e-5)
    mean, half = mean_and_interval([0.7])
    assert mean == 0.7 and isnan(half)
    assert all(map(isnan, mean_and_interval([0.7, nan])))


def test_seeds_are_one_row_with_mean_and_interval(tmp_path):
    for seed, accuracy in enumerate((0.80, 0.82, 0.84)):
        write_run(
            tmp_path / f"s{seed}",
            {"seed": seed},
            (0.1, 0.5, accuracy),
            up=(50 + seed) * 1e6,
            test=accuracy - 0.1,
        )
    (row,) = comparison([load_run(p) for p in find_runs([tmp_path])]).to_dict("records")
    assert (row["setting"], row["n"], row["rounds"], row["status"]) == ("fedavg", 3, 2, "finished")
    assert row["val accuracy"] == pytest.approx(0.82)
    assert row["val accuracy ±"] == pytest.approx(0.0496827, abs=1e-6)
    assert row["test accuracy"] == pytest.approx(0.72)
    assert row["up MB"] == pytest.approx(102)  # two rounds of 50, 51 and 52 MB
    assert row["up MB ±"] == pytest.approx(4.30265 * 2 / 3**0.5, rel=1e-5)
    assert row["down MB"] == pytest.approx(204)
    assert row["client TFLOP"] == pytest.approx(2)
    assert row["simulated s"] == pytest.approx(20)
    assert row["density"] == 1


def test_bytes_are_divided_by_those_of_fedavg(tmp_path):
    dense = [write_run(tmp_path / f"d{s}", {"seed": s}, up=mb * 1e6) for s, mb in enumerate((40, 60))]
    thin = write_run(tmp_path / "p", staged(), up=12.5e6, density=0.1)
    rows = rows_of(*dense, thin)
    # 25 MB against the mean of 80 and 120
    assert rows.loc["staged", "up × FedAvg"] == pytest.approx(0.25)
    assert rows.loc["staged", "down × FedAvg"] == pytest.approx(0.25)
    assert rows.loc["fedavg", "up × FedAvg"] == 1
    assert rows.loc["staged", "density"] == pytest.approx(0.1)


def test_without_fedavg_there_is_no_ratio(tmp_path):
    rows = rows_of(write_run(tmp_path / "p", staged()))
    assert isnan(rows["up × FedAvg"].iloc[0])


def test_fedavg_must_agree_in_all_but_the_method(tmp_path):
    rows = rows_of(
        write_run(tmp_path / "a", {"model": "cnn"}, up=100e6),
        write_run(tmp_path / "b", staged() | {"model": "cnn"}, up=10e6),
        write_run(tmp_path / "c", staged() | {"model": "mlp"}, up=10e6),
    )
    assert rows.loc["staged cnn", "up × FedAvg"] == pytest.approx(0.1)
    assert isnan(rows.loc["staged mlp", "up × FedAvg"])


def test_among_several_fedavgs_the_one_with_the_same_options_counts(tmp_path):
    rows = rows_of(
        write_run(tmp_path / "a", {"method.lr": 0.1}, up=100e6),
        write_run(tmp_path / "b", {"method.lr": 0.2}, up=50e6),
        write_run(tmp_path / "c", staged(lr=0.2), up=10e6),
        write_run(tmp_path / "d", staged(lr=0.3), up=10e6),
    )
    assert rows.loc["staged lr=0.2", "up × FedAvg"] == pytest.approx(0.2)
    assert isnan(rows.loc["staged lr=0.3", "up × FedAvg"])  # either would be a choice made in silence


def test_unfinished_runs_are_rows_of_their_own(tmp_path):
    done = write_run(tmp_path / "s0", {"seed": 0}, (0.1, 0.5, 0.8))
    on = write_run(tmp_path / "s1", {"seed": 1}, (0.1, 0.4), status=None)
    stopped = write_run(tmp_path / "s2", {"seed": 2}, (0.1, 0.3), status="stopped")
    frame = comparison([load_run(p) for p in (done, on, stopped)])
    assert frame["n"].tolist() == [1, 1, 1]
    assert frame["status"].tolist() == ["finished", "unfinished at round 1", "stopped at round 1"]
    assert frame["val accuracy"].tolist() == [0.8, 0.4, 0.3]
    assert frame["up × FedAvg"].tolist()[0] == 1
    assert frame[["up × FedAvg", "test accuracy"]].iloc[1:].isna().all().all()


def test_another_number_of_rounds_is_marked(tmp_path):
    paths = [write_run(tmp_path / f"t{n}", staged(threshold=n)) for n in range(2)]
    longer = write_run(tmp_path / "t9", {"rounds": 3}, (0.1, 0.2, 0.3, 0.4))
    frame = comparison([load_run(p) for p in (*paths, longer)])
    assert frame["rounds"].tolist() == [2, 2, 3]
    assert frame["status"].tolist() == ["finished", "finished", "finished; other rows: 2 rounds"]
    assert frame["up × FedAvg"].isna().tolist() == [True, True, False]


def test_the_same_seed_twice_is_not_two_samples(tmp_path):
    first = write_run(tmp_path / "a", accuracies=(0.1, 0.2, 0.3))
    again = write_run(tmp_path / "b", {"tracking.uri": "elsewhere"}, accuracies=(0.1, 0.2, 0.9))
    (row,) = comparison([load_run(first), load_run(again)]).to_dict("records")
    assert (row["n"], row["val accuracy"]) == (1, 0.9)
    assert row["status"] == "finished; seed 0 stands 2 times, one counts"


def test_accuracy_at_is_the_first_time_it_was_measured(tmp_path):
    run = load_run(write_run(tmp_path / "a", accuracies=(0.1, None, 0.8, 0.7, 0.9), up=5))
    reached = accuracy_at(run, 0.8)
    assert reached is not None
    assert (reached.round, reached.up_bytes, reached.simulated_s) == (2, 10, 20)
    assert accuracy_at(run, 0.95) is None


def test_a_target_adds_columns_and_is_censored(tmp_path):
    rows = rows_of(
        write_run(tmp_path / "a0", {"seed": 0}, (0.1, 0.8, 0.9)),
        write_run(tmp_path / "a1", {"seed": 1}, (0.1, 0.5, 0.8)),
        write_run(tmp_path / "b0", staged() | {"seed": 0}, (0.1, 0.8, 0.9)),
        write_run(tmp_path / "b1", staged() | {"seed": 1}, (0.1, 0.5, 0.79)),
        target=0.8,
    )
    columns = ["rounds to 0.80", "up MB to 0.80", "seconds to 0.80"]
    assert rows.loc["fedavg", columns].tolist() == [1.5, 75, 15]
    assert rows.loc["staged", columns].isna().all()  # one seed never did
    with pytest.raises(ConfigError, match=r"target: got 80; an accuracy is in \(0, 1\]"):
        rows_of(tmp_path / "a0", target=80)


# ── showing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two(tmp_path):
    """FedAvg over two seeds, and a pruning run that goes on."""
    write_run(tmp_path / "runs" / "d0", {"seed": 0}, (0.1, 0.5, 0.8))
    write_run(tmp_path / "runs" / "d1", {"seed": 1}, (0.1, 0.5, 0.81))
    write_run(tmp_path / "runs" / "p", staged(), (0.1, 0.4), up=617e6, status=None)
    return tmp_path / "runs"


def test_markdown(two):
    table = to_markdown(comparison([load_run(p) for p in find_runs([two])], target=0.8))
    head, rule, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert head[:5] == ["setting", "n", "val accuracy", "test accuracy", "density"]
    assert head[5:9] == ["up MB (× FedAvg)", "down MB (× FedAvg)", "client TFLOP", "simulated s"]
    assert head[9:] == ["rounds to 0.80", "up MB to 0.80", "seconds to 0.80", "rounds", "status"]
    assert rule == ["---", *["---:"] * 12, "---"]
    done, going_on = rows
    assert done[:5] == ["fedavg", "2", "0.805 ±0.064", "0.750 ±0.000", "1"]
    assert done[5:] == ["100 (1×)", "200 (1×)", "2", "20", "2", "100", "20", "2", "finished"]
    assert going_on[:5] == ["staged", "1", "0.400", "—", "1"]
    assert going_on[5:] == ["617 (—)", "1,234 (—)", "1", "10", "—", "—", "—", "1", "unfinished at round 1"]


def test_a_bar_in_a_label_does_not_end_a_cell(tmp_path):
    paths = [write_run(tmp_path / f"t{n}", {"model": model}) for n, model in enumerate(("a|b", "c"))]
    assert to_markdown(comparison([load_run(p) for p in paths])).splitlines()[2].startswith("| a\\|b |")


def printed(frame, width):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render_table(frame))
    return capture.get()


def test_the_terminal_shows_every_number_whole(two):
    frame = comparison([load_run(p) for p in find_runs([two])])
    text = printed(frame, 100)
    for part in ("0.805 ±0.064", "100 (1×)", "1,234 (—)", "unfinished at round 1"):
        assert part in text


def test_what_all_rows_share_stands_below(tmp_path):
    text = printed(rows_of(write_run(tmp_path / "a", {"method.name": "[red]"})).reset_index(), 100)
    assert "n = 1 · 2 rounds · finished" in text
    assert "status" not in text
    assert "[red]" in text  # a label is not markup


def test_small_counts_are_shown_in_gflop(two):
    frame = comparison([load_run(p) for p in find_runs([two])])
    frame["client TFLOP"] = [0.0123, 0.004]
    assert "| client GFLOP |" in to_markdown(frame)
    assert "| 12.3 |" in to_markdown(frame)


# ── pictures
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def settings_of(*paths):
    return settings([load_run(path) for path in paths])


def test_a_line_is_the_mean_over_seeds_where_all_were_measured(tmp_path):
    one = write_run(tmp_path / "a", {"seed": 0}, (0.1, 0.5, 0.8), up=10)
    two = write_run(tmp_path / "b", {"seed": 1}, (0.3, None, 0.6), up=20)
    (look,) = figures.looks_of(settings_of(one, two))
    curve = figures.curve_of(look, "total/bytes/up", "val/accuracy")
    assert curve is not None
    np.testing.assert_allclose(curve.x, [0, 30])
    np.testing.assert_allclose(curve.mean, [0.2, 0.7])
    np.testing.assert_allclose(curve.low, [0.1, 0.6])
    np.testing.assert_allclose(curve.high, [0.3, 0.8])
    assert figures.curve_of(look, "round", "no/metric") is None


def test_fedavg_is_black_and_the_best_have_colours(tmp_path):
    many = figures.MAX_NAMED + 3
    paths = [write_run(tmp_path / "dense", accuracies=(0.1, 0.2))]
    paths += [write_run(tmp_path / f"t{n}", staged(threshold=n), (0.1, 0.3 + n / 100)) for n in range(many)]
    looks = figures.looks_of(settings_of(*paths))
    named = [look for look in looks if look.name is not None]
    assert [look.setting.label for look in looks[:4]] == [f"staged threshold={n}" for n in range(4)]
    assert len(looks) - len(named) == 4
    assert named[0].name == "fedavg" and named[0].color == figures.BLACK
    assert len({(look.color, look.stroke) for look in named}) == figures.MAX_NAMED


def test_density_of_clients_is_drawn_only_where_it_is_their_own(tmp_path):
    paths = [write_run(tmp_path / name, {"model": name}) for name in ("shared", "own")]
    for path, density in zip(paths, ((1.0, 0.5), (0.3, 0.3)), strict=True):
        lines = lines_of((0.1, 0.5, 0.8), 1)
        for line, server, client in zip(lines, (1.0, 0.5, 0.5), (None, *density), strict=True):
            line["metrics"]["density/global"] = server
            if client is not None:  # of the mask that the round began with
                line["metrics"]["density/client_mean"] = client
        (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared, own = (
        figures.curve_of(look, "round", "density/global") for look in figures.looks_of(settings_of(*paths))
    )
    assert shared is not None and own is not None
    assert figures.density_of_clients(shared) is None
    drawn = figures.density_of_clients(own)
    assert drawn is not None
    np.testing.assert_allclose(drawn.mean, [0.3, 0.3])


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 5)), min_size=1, max_size=15))
@examples(deadline=None, max_examples=50)
def test_names_do_not_overlap_and_stay_in_order(things):
    wanted = sorted(place for place, _ in things)
    sizes = [size for _, size in things]
    centres = figures.spread(wanted, sizes, 100.0)
    for (a, b), (left, right) in zip(pairwise(sizes), pairwise(centres), strict=True):
        assert right - left >= (a + b) / 2 - 1e-9
    assert centres[0] >= -1e-9 and centres[-1] <= 100 + 1e-9


def test_names_with_room_stay_where_they_want():
    assert figures.spread([10, 50, 90], [4, 4, 4], 100) == [10, 50, 90]
    assert figures.spread([50, 50], [4, 4], 100) == [48, 52]
    assert figures.spread([100, 100], [4, 4], 100) == [96, 100]


# ── writing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_report_is_pictures_and_tables_and_touches_nothing_else(two):
    before = contents(two)
    report = write_report([two], target=0.8)
    assert report.path == two / "report"
    assert [path.name for path in report.files] == [*figures.NAMES, "table.md", "table.csv"]
    for path in report.files[:5]:
        image = imread(path)
        assert image.shape[:2] == (650, 1001)
        assert 0.005 < float((image[..., :3].min(axis=2) < 0.9).mean()) < 0.5  # ink, but not only ink
    after = contents(two)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == set(report.files)
    assert "| staged | 1 |" in (report.path / "table.md").read_text(encoding="utf-8")
    assert pd.read_csv(report.path / "table.csv")["val accuracy ±"].iloc[0] == pytest.approx(
        12.7062 * 0.005, rel=1e-5
    )


def test_a_second_report_replaces_its_own_files_only(two):
    first = write_report([two])
    own = {path.name: path.read_bytes() for path in first.files}
    (first.path / "notes.txt").write_text("mine")
    assert {path.name: path.read_bytes() for path in write_report([two]).files} == own
    for path in two.glob("d*/client_accuracy.parquet"):
        path.unlink()
    third = write_report([two])
    assert not (third.path / figures.CLIENTS).exists()  # it would show other runs than the rest
    assert (third.path / "notes.txt").read_text() == "mine"


def test_where_a_report_goes(two, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda settings, target: {})
    assert write_report([two / "d0"]).path == two / "d0" / "report"
    assert write_report([two / "d0", two / "p"]).path == two / "report"
    assert write_report([two], tmp_path / "x" / "y").path == tmp_path / "x" / "y"
    monkeypatch.chdir(two)
    assert write_report(["d0", "d1"]).path == two / "report"
    assert find_runs([two]) == [two / "d0", two / "d1", two / "p"]


def test_a_folder_that_cannot_be_written_is_named(two, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda settings, target: {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: cannot be written: .*--out"):
        write_report([two], tmp_path / "file")


def test_runs_without_any_round_still_have_a_table(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("seed: 0\n")
    assert [path.name for path in write_report([tmp_path]).files] == ["table.md", "table.csv"]


def test_reading_a_report_loads_neither_torch_nor_a_server():
    code = (
        "import sys, fedray.experiment.report\n"
        "heavy = {'torch', 'ray', 'mlflow', 'matplotlib', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "import fedray.experiment.figures\n"
        "heavy |= {'torch', 'ray', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip() == ""
