"""`fedray compare`: what differs, paired by seed; and runs that cannot be compared."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.errors import ConfigError
from fedray.experiment.run import run
from fedray.overview.comparing import config_differences, sides_of
from fedray.report.table import mean_and_interval
from tests.experiment import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds each, in a folder each; and single runs that differ in other ways."""
    folder = tmp_path_factory.mktemp("compared")
    for seed in (0, 1):
        run(tiny.config(seed=seed), out=folder / "dense" / f"s{seed}")
        run(tiny.config({"method.lr": 0.2, "seed": seed}), out=folder / "fast" / f"s{seed}")
    run(tiny.config({"data.partition.kind": "dirichlet"}), out=folder / "skewed")
    run(tiny.config({"data.validation_fraction": 0.2}), out=folder / "split")
    run(tiny.config(seed=7), out=folder / "seventh")
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), out=folder / "cut", on_round=tiny.ending(1, KeyboardInterrupt))
    return folder


def result(path: Path) -> float:
    return float(json.loads((path / "result.json").read_text())["test/accuracy"])


def test_sides_are_paired_by_seed(runs: Path) -> None:
    dense, fast = sides_of([runs / "dense", runs / "fast"])
    gained = [result(runs / "fast" / s) - result(runs / "dense" / s) for s in ("s0", "s1")]
    assert fast.difference(dense, "test accuracy") == (*mean_and_interval(gained), 2)
    assert config_differences([dense, fast]) == {"method.lr": [0.05, 0.2]}
    only = sides_of([runs / "dense" / "s1", runs / "fast"])[1]
    assert only.difference(sides_of([runs / "dense" / "s1", runs / "fast"])[0], "test accuracy")[2] == 1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("skewed", "data.partition.kind is dirichlet, not iid"),
        ("split", "data.validation_fraction is 0.2, not 0.1"),
        ("seventh", "seed 7, not 0: another partition and validation split"),
        ("cut", "it is unfinished (round 1 of 3)"),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_reason(runs: Path, other: str, reason: str) -> None:
    base = runs / "dense" / "s0"
    with pytest.raises(ConfigError) as refused:
        sides_of([base, runs / other])
    assert reason in str(refused.value)
    assert str(runs / other) in str(refused.value)
    # beside one that can be compared it is named
    found = sides_of([base, runs / other, runs / "fast" / "s0"])
    assert [side.problem is None for side in found] == [True, False, True]
    assert reason in str(found[1].problem)


def test_one_setting_is_not_enough(runs: Path) -> None:
    with pytest.raises(ConfigError, match="compare needs two runs, sweeps or settings: got"):
        sides_of([runs / "dense"])
    with pytest.raises(ConfigError, match="no runs found"):
        sides_of([runs / "dense", runs / "nowhere"])


def test_the_command_shows_it_as_a_table_and_as_json(runs: Path) -> None:
    def shown(*words: str) -> str:
        done = CliRunner().invoke(cli.app, ["compare", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    words = [str(runs / name) for name in ("dense", "fast", "skewed")]
    text = shown(*words)
    assert "not compared with A: data.partition.kind is dirichlet, not iid" in text
    assert any(line.split() == ["method.lr", "0.05", "0.2", "0.05"] for line in text.splitlines())
    (line,) = (line for line in text.splitlines() if line.startswith("test accuracy"))
    assert line.count("±") == 3  # of both sides, and of their difference
    tree = json.loads(shown(*words, "--json"))
    assert tree["sides"][2]["differences"] is None and tree["sides"][2]["problem"]
    assert tree["sides"][1]["differences"]["test accuracy"]["pairs"] == 2
    assert tree["config"]["method.lr"] == [0.05, 0.2, 0.05]
