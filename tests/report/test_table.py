"""How runs are compared, what is shown and written; numbers are worked out by hand."""

import subprocess
import sys
from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console

from fedray.errors import ConfigError
from fedray.report import figures
from fedray.report.decision_figure import DECISIONS
from fedray.report.reading import find_runs, load_run
from fedray.report.table import (
    accuracy_at,
    comparison,
    mean_and_interval,
    render_table,
    to_markdown,
    write_report,
)
from tests.report.rundirs import staged, write_run


def rows_of(*paths, target=None):
    return comparison([load_run(path) for path in paths], target).set_index("setting")


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


SHAPES = {
    "normal": (lambda rng: rng.standard_normal((4000, 5)), (0.94, 0.96)),
    "uniform": (lambda rng: rng.uniform(-1, 1, (4000, 5)), (0.92, 0.96)),
    "skewed": (lambda rng: rng.gamma(4, 1, (4000, 5)) - 4, (0.92, 0.96)),
    "heavy tails": (lambda rng: rng.standard_t(5, (4000, 5)), (0.94, 0.97)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_interval_of_five_seeds_covers_what_it_says(shape):
    draw, (low, high) = SHAPES[shape]
    drawn = draw(np.random.default_rng(0))
    covered = [abs(mean) <= half for mean, half in map(mean_and_interval, drawn.tolist())]
    assert low < np.mean(covered) < high


def test_a_bootstrap_of_five_seeds_covers_less_than_it_says():
    """Why there is none, and what the intervals are worth that docs/agent.md still has of it."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((1000, 5))
    again = np.sort(np.take_along_axis(drawn[:, None], rng.integers(5, size=(1, 400, 5)), axis=2), axis=2)
    middle = again @ np.array([0, 0.75, 1, 0.75, 0]) / 2.5  # the interquartile mean of five
    for means, low, high in ((again.mean(2), 0.80, 0.87), (middle, 0.87, 0.93)):
        ends = np.quantile(means, (0.025, 0.975), axis=1)
        assert low < np.mean((ends[0] <= 0) & (ends[1] >= 0)) < high


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
    assert row["theoretical TFLOP"] == pytest.approx(2) and row["executed TFLOP"] == pytest.approx(4)
    assert row["client kJ"] == pytest.approx(6)
    assert [row[f"{kind} s"] for kind in ("simulated", "compute-bound", "network-bound")] == [20, 80, 10]
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


def test_a_run_that_has_only_begun_is_a_row_without_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    (row,) = comparison([load_run(tmp_path)]).to_dict("records")
    assert row["status"] == "no round yet"
    assert isnan(row["rounds"])


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
    costs = [*("up MB", "down MB", "executed TFLOP", "theoretical TFLOP", "client kJ")]
    costs += ["simulated s", "compute-bound s", "network-bound s"]
    assert head[5:13] == [f"{cost} (× FedAvg)" for cost in costs]
    until = ["rounds to 0.80", "up MB to 0.80", "seconds to 0.80 (× FedAvg)"]
    assert head[13:] == [*until, "rounds", "status"]
    assert rule == ["---", *["---:"] * 16, "---"]
    done, going_on = rows
    assert done[:5] == ["fedavg", "2", "0.805 ±0.064", "0.750 ±0.000", "1"]
    assert done[5:9] == ["100 (1×)", "200 (1×)", "4 (1×)", "2 (1×)"]
    assert done[9:13] == ["6 (1×)", "20 (1×)", "80 (1×)", "10 (1×)"]
    assert done[13:] == ["2", "100", "20 (1×)", "2", "finished"]
    assert going_on[:5] == ["staged", "1", "0.400", "—", "1"]
    assert going_on[5:9] == ["617 (—)", "1,234 (—)", "2 (—)", "1 (—)"]
    assert going_on[13:] == ["—", "—", "— (0 of 1)", "1", "unfinished at round 1"]


def test_markdown_has_differences_and_intervals(tmp_path):
    for seed, (test, up) in enumerate([(0.70, 40e6), (0.74, 60e6)]):
        write_run(tmp_path / f"d{seed}", {"seed": seed}, test=test, up=up)
        write_run(tmp_path / f"p{seed}", staged() | {"seed": seed}, test=test + 0.01 * (1 + seed), up=up / 4)
    frame = comparison([load_run(p) for p in find_runs([tmp_path])])
    rows = frame.set_index("setting")
    # +1 and +2 points: mean 1.5, sd 0.7071, t(1) = 12.706, half = 12.706 · 0.7071 / √2
    assert rows.loc["staged", "test − FedAvg"] == pytest.approx(1.5)
    assert rows.loc["staged", "test − FedAvg ±"] == pytest.approx(6.353, abs=1e-3)
    assert rows["test − FedAvg"].isna().tolist() == [True, False]
    assert rows.loc["staged", "theoretical × FedAvg"] == 1
    table = to_markdown(frame)
    assert "| +1.5 ±6.4 |" in table
    assert "| 25 ±63.5 (0.25×) |" in table  # 20 and 30 MB


def test_fedavg_with_coarse_values_is_compared_and_not_the_reference(tmp_path):
    coarse = {"method.uplink_values": "int8"}
    rows = rows_of(
        write_run(tmp_path / "a", {"method.uplink_values": "fp32"}, up=100e6),
        write_run(tmp_path / "b", coarse, up=25e6),
        write_run(tmp_path / "c", staged(**{"uplink_values": "int8"}), up=10e6),
    )
    assert rows["up × FedAvg"].tolist() == pytest.approx([1, 0.25, 0.1])


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
    frame["theoretical TFLOP"] = [0.0123, 0.004]
    frame["client kJ"] = [0.0456, 0.004]
    table = to_markdown(frame)
    assert "| executed TFLOP (× FedAvg) | theoretical GFLOP (× FedAvg) | client J (× FedAvg) |" in table
    assert "| 12.3 " in table and "| 45.6 " in table


def test_a_cost_that_no_run_has_is_no_column(two):
    """Runs from before energy was measured."""
    frame = comparison([load_run(p) for p in find_runs([two])])
    frame["client kJ"] = float("nan")
    assert "client" not in to_markdown(frame) and "compute-bound s" in to_markdown(frame)


# ── writing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_report_is_pictures_and_tables_and_touches_nothing_else(two):
    before = contents(two)
    report = write_report([two], target=0.8)
    assert report.path == two / "report"
    pictures = [name for name in figures.NAMES if name != DECISIONS]  # nobody decides in these
    assert [path.name for path in report.files] == [*pictures, "table.md", "table.csv", "report.json"]
    for path in report.files[: len(pictures)]:
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
    monkeypatch.setattr(figures, "draw", lambda *_: {})
    assert write_report([two / "d0"]).path == two / "d0" / "report"
    assert write_report([two / "d0", two / "p"]).path == two / "report"
    assert write_report([two / "d0", two / "p"]).path == two / "report"  # its own
    assert write_report([two], tmp_path / "x" / "y").path == tmp_path / "x" / "y"
    monkeypatch.chdir(two)
    assert write_report(["d0", "d1"]).path == two / "report-2"  # the first holds another one
    assert find_runs([two]) == [two / "d0", two / "d1", two / "p"]


def test_a_folder_that_cannot_be_written_is_named(two, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: cannot be written: .*--out"):
        write_report([two], tmp_path / "file")


def test_runs_without_any_round_still_have_a_table(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("seed: 0\n")
    assert [path.name for path in write_report([tmp_path]).files] == ["table.md", "table.csv", "report.json"]


def test_reading_a_report_loads_neither_torch_nor_a_server():
    code = (
        "import sys, fedray.report.table\n"
        "heavy = {'torch', 'ray', 'mlflow', 'matplotlib', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "import fedray.report.figures\n"
        "heavy |= {'torch', 'ray', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip() == ""
