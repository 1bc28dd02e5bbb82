"""`fedray plan`: its estimates beside a real run; it leaves nothing behind, and names what does not fit."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.config import yaml_text
from fedray.experiment.run import run
from fedray.sweeps.planning import plan
from tests.experiment import tiny


def test_a_plan_is_near_the_real_run_and_leaves_nothing(in_tmp: Path) -> None:
    config = tiny.config(rounds=20)
    found = plan([config], None, sweeps=False, measures=True)
    assert tiny.listing(in_tmp) == []
    real = run(config, out=in_tmp / "r").result
    for name, value in {
        "total/bytes/up": found.up_bytes,
        "total/bytes/down": found.down_bytes,
        "total/flops/clients": found.flops,
    }.items():
        assert value == pytest.approx(real[name], rel=0.35), name  # which clients drop out is chance
    size = sum(file.stat().st_size for file in (in_tmp / "r").rglob("*") if file.is_file())
    assert found.disk_bytes == pytest.approx(size, rel=0.6)
    assert (found.rounds, found.trials, found.problems) == (20, 1, ())
    assert found.wall_s and found.memory_bytes


def test_without_a_measure_it_only_counts() -> None:
    found = plan([tiny.config(), tiny.config(seed=1)], 1, sweeps=True, measures=False)
    assert (found.trials, found.rounds, found.concurrent, found.wall_s) == (2, 2 * tiny.ROUNDS, 1, None)


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tiny.config({"clients.actors": 3, "clients.resources.cpu": 1000})
    found = plan([config], None, sweeps=False, measures=False)
    assert any("client actors need 3000 CPUs" in problem for problem in found.problems)


def test_the_command_plans_a_sweep(in_tmp: Path) -> None:
    (in_tmp / "s.yaml").write_text(
        yaml_text.dump({"base": tiny.TREE, "space": {"method.name": {"grid": ["fedavg", "snip"]}}})
    )
    done = CliRunner().invoke(cli.app, ["plan", "s.yaml", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["trials"], told["rounds"]) == (2, 2 * tiny.ROUNDS) and told["up_bytes"] > 0
    assert tiny.listing(in_tmp) == ["s.yaml"]
